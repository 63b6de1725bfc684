from __future__ import annotations

import dataclasses
import datetime
import gc
import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from orchestrator.policies import Plan, Policy, Snapshot, build_policy
from orchestrator.policies.conformance import Fault, check_policy, sample
from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.sample_worlds import snapshots

FAIR = FairShare()


class Honest:
    def decide(self, snapshot: Snapshot) -> Plan:
        return FAIR.decide(snapshot)


class ClockReader(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        time.monotonic()
        return super().decide(snapshot)


class DateReader(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        datetime.datetime.now(datetime.UTC)
        return super().decide(snapshot)


class Printer(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        print("deciding")  # noqa: T201
        return super().decide(snapshot)


class FileWriter(Honest):
    path = Path("unset")

    def decide(self, snapshot: Snapshot) -> Plan:
        self.path.write_text(f"{snapshot.now_s}")
        return super().decide(snapshot)


class Drawer(Honest):
    """Draws, and does not even use it."""

    def decide(self, snapshot: Snapshot) -> Plan:
        random.random()
        return super().decide(snapshot)


class NumpyDrawer(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        np.random.rand()
        return super().decide(snapshot)


class Tosser(Honest):
    """Another reason by a generator of its own, whose seed nobody knows."""

    def decide(self, snapshot: Snapshot) -> Plan:
        return dataclasses.replace(super().decide(snapshot), reason=f"drew {random.Random().random()}")


class Alternating(Honest):
    def __init__(self) -> None:
        self.is_odd = False

    def decide(self, snapshot: Snapshot) -> Plan:
        self.is_odd = not self.is_odd
        return dataclasses.replace(super().decide(snapshot), reason=f"odd: {self.is_odd}")


class Counter(Honest):
    """Its state shows in no plan yet."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def decide(self, snapshot: Snapshot) -> Plan:
        self.count += 1
        return super().decide(snapshot)


class Remembering(Honest):
    """Keeps its state outside itself: only a second look at an early world tells."""

    seen: list[int] = []  # noqa: RUF012

    def decide(self, snapshot: Snapshot) -> Plan:
        if snapshot.seed not in self.seen:
            self.seen.append(snapshot.seed)
        return dataclasses.replace(super().decide(snapshot), reason=f"{len(self.seen)} worlds so far")


class Ordered(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        first = snapshot.trials[0].trial_id if snapshot.trials else "nobody"
        return dataclasses.replace(super().decide(snapshot), reason=f"{first} comes first")


class Greedy(Honest):
    """Everybody gets all."""

    def decide(self, snapshot: Snapshot) -> Plan:
        plan = super().decide(snapshot)
        rows = tuple(
            dataclasses.replace(row, settings=dataclasses.replace(row.settings, share=1.0)) for row in plan.allocations
        )
        return dataclasses.replace(plan, allocations=rows)


class Restless(Honest):
    """Cannot make up its mind between two policies."""

    def decide(self, snapshot: Snapshot) -> Plan:
        return (FAIR if snapshot.plan.generation % 2 else build_policy("static")).decide(snapshot)


class Broken(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        raise RuntimeError("no idea")


class Meddler(Honest):
    def decide(self, snapshot: Snapshot) -> Plan:
        plan = super().decide(snapshot)
        object.__setattr__(snapshot, "now_s", snapshot.now_s + 1)
        return plan


def faults(policy: Policy, worlds: Iterable[Snapshot] | None = None) -> set[Fault]:
    return {finding.fault for finding in check_policy(policy, snapshots(30) if worlds is None else worlds)}


def test_an_honest_policy_has_no_findings() -> None:
    assert check_policy(Honest(), sample(40, 10), rests=False) == ()


def test_what_others_do_at_a_garbage_collection_is_not_the_policys() -> None:
    threshold = gc.get_threshold()

    def note_the_time(_phase: str, _info: dict[str, int]) -> None:
        time.perf_counter()

    gc.callbacks.append(note_the_time)
    gc.set_threshold(1)
    try:
        assert check_policy(Honest(), sample(4, 1), rests=False) == ()
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note_the_time)


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        (ClockReader(), Fault.CLOCK),
        (DateReader(), Fault.CLOCK),
        (Printer(), Fault.IO),
        (Drawer(), Fault.RANDOM),
        (NumpyDrawer(), Fault.RANDOM),
        (Tosser(), Fault.STATE),
        (Alternating(), Fault.STATE),
        (Counter(), Fault.STATE),
        (Remembering(), Fault.STATE),
        (Ordered(), Fault.ORDER),
        (Greedy(), Fault.ILLEGAL),
        (Restless(), Fault.THRASH),
        (Broken(), Fault.RAISES),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, Fault) else value.name,
)
def test_each_kind_of_fault_is_caught_and_only_that(policy: Policy, fault: Fault) -> None:
    assert faults(policy) == {fault}


def test_a_policy_that_changes_its_argument_is_caught() -> None:
    assert Fault.MUTATES in faults(Meddler())


def test_a_policy_that_writes_a_file_is_caught(tmp_path: Path) -> None:
    policy = FileWriter()
    policy.path = tmp_path / "memory"
    assert faults(policy) == {Fault.IO}


def test_a_finding_says_what_was_seen_and_where() -> None:
    (finding,) = check_policy(ClockReader(), snapshots(5))
    assert (finding.seed, finding.num_worlds) == (0, 5)
    assert "of decide calls time.monotonic" in finding.text
    assert str(finding) == f"reads a clock: {finding.text} (first in the world of seed 0; 5 worlds)"


def test_whoever_watched_before_watches_on() -> None:
    import sys

    def watch(*_: object) -> None:
        """Nothing."""

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        check_policy(Broken(), snapshots(2))
        assert sys.getprofile() is watch
    finally:
        sys.setprofile(before)


def test_no_worlds_no_findings() -> None:
    assert check_policy(Broken(), ()) == ()
