from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest

from orchestrator.errors import ShareError
from orchestrator.share import SHARES
from orchestrator.share.cpu_cores import CpuCores, ProcessThreads
from orchestrator.share.logical import Logical


class FakeThreads:
    """Threads of a process on cores 2, 3 and 5; they may be born or die between two calls."""

    def __init__(self) -> None:
        self.bound: dict[int, set[int]] = {10: {2, 3, 5}, 11: {2, 3, 5}, 12: {5}}
        self.num_compute = 3
        self.born: list[int] = []
        self.ended: set[int] = set()
        self.refuses = False

    def ids(self) -> Iterable[int]:
        if self.born:
            self.bound[self.born.pop()] = {2, 3, 5}
        return [*self.bound, *self.ended]

    def cores(self, thread_id: int) -> set[int]:
        if thread_id in self.ended:
            raise ProcessLookupError(thread_id)
        return set(self.bound[thread_id or 10])

    def bind(self, thread_id: int, cores: Iterable[int]) -> None:
        if thread_id in self.ended:
            raise ProcessLookupError(thread_id)
        if self.refuses:
            raise PermissionError("not in this container")
        self.bound[thread_id] = set(cores)

    def count(self) -> int:
        return self.num_compute

    def set_count(self, count: int) -> None:
        self.num_compute = count

    def compute_ids(self) -> list[int]:
        return [10, 12, 11][: self.num_compute]


class Process:
    def __init__(self) -> None:
        self.now_s = self.used_s = 0.0
        self.threads = FakeThreads()
        self.share = CpuCores(self.threads, now_s=lambda: self.now_s, used_s=lambda: self.used_s, wait=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_every_thread_is_bound_to_the_cores_its_units_index() -> None:
    process = Process()
    process.share.apply((0, 1, 2), 1.5)
    assert process.share.node_cores == (2, 3, 5)
    assert process.threads.bound == {10: {2, 3, 5}, 11: {2, 3, 5}, 12: {2, 3, 5}}
    assert process.threads.num_compute == 2


def test_as_many_threads_as_cores_get_a_core_each() -> None:
    process = Process()
    process.share.apply((0, 2), 2.0)
    assert process.threads.bound == {10: {2}, 11: {2, 5}, 12: {5}}
    process.share.apply((0, 1, 2), 2.0)
    assert all(cores == {2, 3, 5} for cores in process.threads.bound.values()), "fewer threads than cores may move"
    process.share.apply((1,), 1.0)
    assert all(cores == {3} for cores in process.threads.bound.values())


def test_threads_born_or_ended_during_the_scan_are_no_trouble() -> None:
    process = Process()
    process.share.apply((1,), 1.0)
    process.threads.born = [20, 21, 22]
    process.threads.ended = {30}
    process.share.apply((0,), 1.0)
    assert set(process.threads.bound) == {10, 11, 12, 20, 21, 22}
    assert all(cores == {2} for cores in process.threads.bound.values())


def test_a_fraction_of_a_core_is_enforced_by_sleeping() -> None:
    process = Process()
    process.share.apply((0,), 0.5)
    process.now_s += 0.01
    process.used_s += 0.01
    assert process.share.hold_back() == pytest.approx(0.01)
    assert process.share.charged_s() == pytest.approx(0.01)


def test_release_restores_threads_cores_and_those_pinned_by_others() -> None:
    process = Process()
    process.share.apply((1,), 0.5)
    process.threads.bound[40] = {3}  # a thread that was born inside the share
    process.share.release()
    process.share.release()
    assert process.threads.bound == {10: {2, 3, 5}, 11: {2, 3, 5}, 12: {5}, 40: {2, 3, 5}}
    assert process.threads.num_compute == 3
    process.used_s += 5.0
    assert process.share.hold_back() == 0.0


def test_a_second_trial_starts_without_the_debt_of_the_first() -> None:
    process = Process()
    process.share.apply((0,), 0.25)
    process.used_s += 5.0
    process.share.release()
    process.share.apply((0,), 0.25)
    assert process.share.hold_back() == 0.0


def test_where_binding_is_refused_the_duty_cycle_is_left_and_said_so() -> None:
    process = Process()
    process.threads.refuses = True
    process.share.apply((0,), 0.5)
    assert "duty cycle only" in process.share.enforcement.note
    assert process.share.enforcement.compute
    process.used_s += 0.1
    assert process.share.hold_back() == pytest.approx(0.2)
    process.threads.refuses = False
    process.share.apply((0,), 0.5)
    assert "duty cycle only" not in process.share.enforcement.note


@pytest.mark.parametrize(
    ("units", "amount", "what"),
    [
        ((3,), 1.0, "3 cores"),
        ((-1,), 1.0, "3 cores"),
        ((), 1.0, "at least one"),
        ((0, 0), 1.0, "twice"),
        ((0,), 1.5, "does not fit"),
        ((0,), 0.0, "pause"),
        ((0,), float("nan"), "does not fit"),
    ],
)
def test_a_grant_that_the_node_cannot_hold_changes_nothing(units: tuple[int, ...], amount: float, what: str) -> None:
    process = Process()
    with pytest.raises(ShareError, match=what):
        process.share.apply(units, amount)
    assert process.threads.bound == {10: {2, 3, 5}, 11: {2, 3, 5}, 12: {5}}
    assert process.threads.num_compute == 3


def test_wake_skips_one_sleep_and_the_debt_stays() -> None:
    process = Process()
    share = CpuCores(process.threads, now_s=lambda: process.now_s, used_s=lambda: process.used_s)
    share.apply((0,), 0.5)
    process.used_s += 3600.0
    share.wake()
    assert share.hold_back() == 0.0  # the fake clock stands still: an hour of sleep would not return in time
    assert share.debt_s == pytest.approx(3600.0)


def test_the_threads_of_this_process_can_be_listed_and_bound_where_they_are() -> None:
    threads = ProcessThreads()
    cores = threads.cores(0)
    assert cores
    for thread_id in threads.ids():
        threads.bind(thread_id, threads.cores(thread_id))
    assert threads.cores(0) == cores


def test_every_mechanism_in_the_table_carries_its_own_name() -> None:
    assert set(SHARES) == {"cpu_cores", "sm_groups", "mps", "time_slice", "logical"}
    for name, build in SHARES.items():
        mechanism = build()
        assert mechanism.name == name
        assert mechanism.enforcement.note
        assert mechanism.charged_s() == 0.0
        assert mechanism.hold_back() == 0.0
        mechanism.release()


def test_a_logical_share_enforces_nothing_and_says_so() -> None:
    share = Logical()
    share.apply((0, 1), 1.5)
    share.wake()
    assert share.hold_back() == 0.0
    assert not share.enforcement.compute
    assert not share.enforcement.memory
    with pytest.raises(ShareError, match="not a share"):
        share.apply((), 1.0)


def test_the_threads_torch_computes_with_are_found() -> None:
    """In a process of its own: here the pools of other tests live."""
    script = """
import os, threading
import torch
from orchestrator.share.cpu_cores import ProcessThreads
threads = ProcessThreads()
idle = threading.Thread(target=threading.Event().wait, daemon=True)
idle.start()
threads.set_count(2)
for _ in range(50):  # on a busy machine a search may end without an answer
    found = threads.compute_ids()
    if len(found) == 2:
        break
assert found[0] == threading.get_native_id(), found
assert found[1] not in {found[0], idle.native_id}, found
assert threads.compute_ids() == found
threads.set_count(1)
assert threads.compute_ids() == found[:1]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
