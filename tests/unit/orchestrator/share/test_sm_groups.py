"""The mechanism of SM groups against a driver that follows the real one: lanes, hand-over, caps, refusals."""

from __future__ import annotations

import pytest

from orchestrator.errors import ShareError
from orchestrator.share.sm_driver import Lane
from orchestrator.share.sm_groups import MAX_KEPT_LANES, SmGroups
from orchestrator.share.whole_gpu import Mps, TimeSlice


class FakeDriver:
    """Opens a lane only for groups that exist, and never closes the one in use."""

    def __init__(self, groups: int = 15) -> None:
        self._groups = groups
        self.open_lanes: list[Lane] = []
        self.entered: list[tuple[int, ...] | None] = []
        self.num_opened = 0

    def num_groups(self) -> int:
        return self._groups

    def open(self, groups: tuple[int, ...]) -> Lane:
        if max(groups) >= self._groups:
            raise ShareError("cuDevResourceGenerateDesc failed with CUDA_ERROR_INVALID_VALUE")
        lane = Lane(groups=groups, stream=object())
        self.open_lanes.append(lane)
        self.num_opened += 1
        return lane

    def enter(self, lane: Lane | None) -> None:
        self.entered.append(None if lane is None else lane.groups)

    def close(self, lane: Lane) -> None:
        assert self.entered[-1] != lane.groups, "the lane in use was closed"
        self.open_lanes.remove(lane)


class FakeMemory:
    def __init__(self) -> None:
        self.fractions: list[float] = []

    def set(self, fraction: float) -> None:
        self.fractions.append(fraction)


def test_a_change_enters_another_lane_and_known_ones_are_kept() -> None:
    driver = FakeDriver()
    share = SmGroups(driver, FakeMemory())
    for units in ((0, 1, 2), (3, 4), (2, 1, 0), (0, 1, 2)):
        share.apply(units, float(len(units)))
    assert driver.entered == [(0, 1, 2), (3, 4), (0, 1, 2)], "the same groups again change nothing"
    assert driver.num_opened == 2
    assert share.key == (0, 1, 2)


def test_release_goes_back_to_the_whole_device_and_keeps_the_newest_lanes() -> None:
    driver = FakeDriver()
    share = SmGroups(driver, FakeMemory())
    for first in range(MAX_KEPT_LANES + 3):
        share.apply((first,), 1.0)
    assert len(driver.open_lanes) == MAX_KEPT_LANES + 3, "none is closed while a graph may belong to it"
    share.release()
    assert driver.entered[-1] is None
    assert [lane.groups for lane in driver.open_lanes] == [(first,) for first in range(3, MAX_KEPT_LANES + 3)]
    share.release()
    assert share.key is None


@pytest.mark.parametrize(
    ("units", "amount"), [((), 1.0), ((15,), 1.0), ((-1,), 1.0), ((0, 1), 1.0), ((0, 1), 2.5), ((3,), float("nan"))]
)
def test_a_grant_that_cannot_be_kept_is_refused(units: tuple[int, ...], amount: float) -> None:
    driver = FakeDriver()
    with pytest.raises(ShareError, match="allowed: whole groups of 0 to 14"):
        SmGroups(driver, FakeMemory()).apply(units, amount)
    assert driver.entered == []


def test_memory_is_capped_from_the_first_grant_to_the_release() -> None:
    memory = FakeMemory()
    share = SmGroups(FakeDriver(), memory, memory_fraction=0.25)
    share.apply((0,), 1.0)
    share.apply((1,), 1.0)
    share.release()
    assert memory.fractions == [0.25, 1.0]
    assert share.enforcement.memory


def test_what_is_enforced_is_said() -> None:
    assert SmGroups(FakeDriver()).enforcement.compute
    alone = SmGroups(FakeDriver(), is_under_mps=False).enforcement
    assert not alone.compute
    assert "take turns" in alone.note
    assert "side by side" in Mps(FakeMemory()).enforcement.note
    assert not TimeSlice(FakeMemory()).enforcement.compute
    assert TimeSlice(FakeMemory(), memory_fraction=0.5).enforcement.memory


@pytest.mark.parametrize("kind", [Mps, TimeSlice])
def test_a_gpu_that_is_not_cut_takes_any_share(kind: type[TimeSlice]) -> None:
    memory = FakeMemory()
    share = kind(memory, memory_fraction=0.5)
    share.apply((0,), 0.25)
    share.apply((0,), 0.5)
    share.release()
    share.release()
    assert memory.fractions == [0.5, 1.0]
    assert (share.num_units, share.key, share.hold_back(), share.charged_s()) == (1, None, 0.0, 0.0)
    with pytest.raises(ShareError, match="is no share"):
        share.apply((), 1.0)
