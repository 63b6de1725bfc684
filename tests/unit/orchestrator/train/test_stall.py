"""When a step of several ranks is taken for stalled, and what is done then."""

from __future__ import annotations

import pytest
import torch

from orchestrator.train.groups import Groups, Ranks
from orchestrator.train.stall import FIRST_STEP_S, LEAST_S, MOST_S, Stall


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def step(one: Stall, clock: Clock, seconds: float) -> None:
    one.begin()
    clock.now_s += seconds
    one.end()


def test_a_step_is_stalled_after_many_times_the_longest_one() -> None:
    clock = Clock()
    one = Stall(least_s=60.0, now_s=clock)
    one.begin()
    clock.now_s += FIRST_STEP_S - 1
    assert not one.is_over(), "the first one may compile"
    clock.now_s += 2
    assert one.is_over()
    one.end()
    clock.now_s += 1e6
    assert not one.is_over(), "between two steps nothing stalls, however long a trial is paused"

    for longest_s, limit_s in ((0.1, 60.0), (10.0, 300.0)):
        one = Stall(least_s=60.0, now_s=clock)
        step(one, clock, longest_s)
        one.begin()
        clock.now_s += limit_s - 1
        assert not one.is_over()
        clock.now_s += 2.0
        assert one.is_over()


def test_two_processes_do_not_leave_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    for pid in (100, 101):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        clock = Clock()
        one = Stall(now_s=clock)
        step(one, clock, 0.01)
        limits.append(one.limit_s)
    assert all(LEAST_S <= limit <= MOST_S for limit in limits)
    assert abs(limits[0] - limits[1]) > 0.5


def test_a_stalled_rank_says_where_it_stands_and_breaks_its_groups_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups, clock, done = Groups(0, 1, torch.device("cpu")), Clock(), []
    one = Stall(least_s=60.0, now_s=clock)
    groups.ranks = Ranks(rank=0, world_size=2, device=torch.device("cpu"), stall=one)
    monkeypatch.setattr(groups, "break_off", lambda: done.append("broken off"))
    monkeypatch.setattr(groups, "is_broken", lambda _timeout_ms: False)
    step(one, clock, 0.1)
    one.begin()
    assert groups._watch() is None
    clock.now_s += 61.0
    assert groups._watch() is groups.ranks
    assert done == ["broken off"]
    assert "test_stall.py" in caplog.text
