"""The agent of a node: what it starts, what it falls back to, and that it stops what it started."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.devices.agent import DeviceAgent
from orchestrator.devices.choice import GpuFacts, GpuShare
from orchestrator.errors import ShareError, UnfitEnvironmentError
from orchestrator.policies.plan import DeviceId
from orchestrator.run_spec import gpu_part
from orchestrator.share.mps import MpsFound
from orchestrator.telemetry.sampler import DeviceSample, Samplers

GOOD = GpuFacts(driver_version=13_000, has_bindings=True, running_mps=None, can_start_mps=True, is_mig=False)


class FakeMps:
    def __init__(self, directory: Path, error: str = "") -> None:
        self.directory, self.error = directory, error
        self.num_starts = self.num_stops = 0

    def start(self) -> MpsFound:
        self.num_starts += 1
        if self.error:
            raise ShareError(self.error)
        return MpsFound(environment={"CUDA_MPS_PIPE_DIRECTORY": str(self.directory)}, is_own=True)

    def stop(self) -> None:
        self.num_stops += 1


class FakeGpus:
    def __init__(self) -> None:
        self.is_closed = threading.Event()

    def sample(self) -> tuple[DeviceSample, ...]:
        return (DeviceSample(device_id=DeviceId("cuda:x"), utilisation_ratio=0.5),)

    def close(self) -> None:
        self.is_closed.set()


def agent(facts: GpuFacts = GOOD, wish: str = "auto", error: str = "") -> tuple[DeviceAgent, list[FakeMps]]:
    made: list[FakeMps] = []

    def make(directory: Path) -> FakeMps:
        made.append(FakeMps(directory, error))
        return made[-1]

    return DeviceAgent(wish, turns_shares=True, token="t", own_mps=make, ask=lambda: facts), made


def test_an_own_mps_is_started_once_and_stopped() -> None:
    one, made = agent()
    ready = one.prepare()
    assert one.prepare() is ready
    assert (ready.share, ready.is_under_mps) == (GpuShare.SM_GROUPS, True)
    assert ready.environment == {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps-t"}
    one.stop()
    one.stop()
    assert (len(made), made[0].num_starts, made[0].num_stops) == (1, 1, 1)


def test_one_that_runs_is_used_and_left_alone() -> None:
    running = MpsFound(environment={"CUDA_MPS_PIPE_DIRECTORY": "/x"}, is_own=False, limits="25 % of the SMs")
    one, made = agent(replace(GOOD, running_mps=running))
    ready = one.prepare()
    one.stop()
    assert made == []
    assert ready.share is GpuShare.MPS
    assert "limits each process to 25 % of the SMs" in ready.words


def test_an_mps_that_does_not_start_means_taking_turns_with_its_reason() -> None:
    one, _ = agent(error="MPS does not start: permission denied")
    ready = one.prepare()
    assert ready.share is GpuShare.TIME_SLICE
    assert not ready.is_under_mps
    assert ready.environment == {}
    assert "no mps: MPS does not start: permission denied" in ready.words


def test_time_slicing_starts_nothing() -> None:
    one, made = agent(wish="time_slice")
    assert one.prepare().share is GpuShare.TIME_SLICE
    assert made == []


def test_samples_are_told_until_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.devices.agent.SAMPLE_PERIOD_S", 0.01)
    gpus, told, seen = FakeGpus(), [], threading.Event()

    def tell(rows: list[dict[str, Any]]) -> None:
        told.append(rows)
        seen.set()

    one = DeviceAgent(
        "mps",
        turns_shares=False,
        token="t",
        own_mps=FakeMps,
        ask=lambda: GOOD,
        open_gpus=lambda: Samplers(available=(gpus,), problems=()),
    )
    assert one.watch(tell) == []
    assert seen.wait(5)
    one.stop()
    assert gpus.is_closed.wait(5)
    assert told[0][0]["utilisation_ratio"] == 0.5


def test_gpus_that_cannot_be_read_are_told_and_nothing_else_happens() -> None:
    problem = UnfitEnvironmentError("NVML does not start: Driver Not Loaded")
    one = DeviceAgent(
        "mps",
        turns_shares=False,
        token="t",
        own_mps=FakeMps,
        ask=lambda: GOOD,
        open_gpus=lambda: Samplers(available=(), problems=(problem,)),
    )
    assert one.watch(print) == [str(problem)]
    one.stop()


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks", "part"), [(1, 1, 1.0), (1, 3, 0.3333), (1, 8, 0.125), (4, 2, 1.0), (2, 5, 0.3333)]
)
def test_ranks_reserve_equal_parts_that_fit(num_gpus: int, num_ranks: int, part: float) -> None:
    assert gpu_part(num_gpus, num_ranks) == part
