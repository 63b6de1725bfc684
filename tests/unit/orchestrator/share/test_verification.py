"""Verdicts on shares: what is seen against what was granted, and no verdict where nothing can be seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.share.contention import MAX_CROWDS, Contention
from orchestrator.share.duty_cycle import BURST_S
from orchestrator.share.verification import (
    LEAST_WALL_S,
    MEMORY_MARGIN,
    NEIGHBOUR_FACTOR,
    Usage,
    Verdict,
    judge_cpu,
    judge_memory,
    judge_speed,
)

GIB = 1 << 30


def usage(cores: float, used: float, wall_s: float = 10.0, longest_cpu_s: float = 0.01) -> Usage:
    return Usage(cores=cores, num_steps=100, wall_s=wall_s, cpu_s=used * wall_s, longest_cpu_s=longest_cpu_s)


@pytest.mark.parametrize(
    ("amount", "used", "verdict"),
    [
        (1.0, 0.98, Verdict.HELD),
        (1.0, 1.9, Verdict.NOT_HELD),
        (0.25, 0.05, Verdict.HELD),
        (0.25, 0.4, Verdict.NOT_HELD),
    ],
)
def test_cpu_time_beyond_the_cores_is_a_deviation(amount: float, used: float, verdict: Verdict) -> None:
    check = judge_cpu(amount, usage(amount, used))
    assert check.verdict is verdict
    assert check.expected == amount
    assert check.observed == pytest.approx(used)
    assert f"{used:.2f} cores, granted {amount:.2f} cores" in check.reason


def test_too_little_is_no_verdict_and_says_what_is_missing() -> None:
    assert judge_cpu(1.0, None).verdict is Verdict.NOT_OBSERVABLE
    check = judge_cpu(1.0, usage(1.0, 5.0, wall_s=LEAST_WALL_S / 2))
    assert check.verdict is Verdict.NOT_OBSERVABLE
    assert "only 1.5 s of steps" in check.reason


@given(
    amount=st.floats(0.05, 8.0),
    step_cpu_s=st.floats(0.001, 3.0),
    num_steps=st.integers(10, 200),
    burst=st.floats(0.0, 1.0),
)
def test_what_a_duty_cycle_allows_is_always_held(
    amount: float, step_cpu_s: float, num_steps: int, burst: float
) -> None:
    """It begins with some credit and may end with one whole step owed."""
    cpu_s = num_steps * step_cpu_s
    wall_s = (cpu_s - step_cpu_s - burst * BURST_S * amount) / amount
    if wall_s > 0:
        seen = Usage(cores=amount, num_steps=num_steps, wall_s=wall_s, cpu_s=cpu_s, longest_cpu_s=step_cpu_s)
        assert judge_cpu(amount, seen).verdict is not Verdict.NOT_HELD


def test_memory_over_its_cap_is_a_deviation() -> None:
    assert judge_memory(10 * GIB, int(10 * GIB * (1 + MEMORY_MARGIN)), "by NVML").verdict is Verdict.HELD
    check = judge_memory(10 * GIB, 11 * GIB, "by NVML")
    assert check.verdict is Verdict.NOT_HELD
    assert "11.00 GiB, granted 10.00 GiB, by NVML" in check.reason
    hidden = judge_memory(10 * GIB, None, "NVML shows none of its processes")
    assert (hidden.verdict, hidden.observed) == (Verdict.NOT_OBSERVABLE, None)


def test_speed_is_judged_against_its_prediction_either_way() -> None:
    assert judge_speed(None, 0.5) is None, "nothing was predicted"
    verdicts = [judge_speed(1.0, realised) for realised in (1.0, 0.5, 0.2, 2.0)]
    assert [check.verdict for check in verdicts if check is not None] == [
        Verdict.HELD,
        Verdict.HELD,
        Verdict.NOT_HELD,
        Verdict.NOT_HELD,
    ]


def test_a_trial_that_slows_by_half_when_a_neighbour_starts_shares_its_groups() -> None:
    book = Contention()
    assert book.note("dials", frozenset(), 0.010).verdict is Verdict.NOT_OBSERVABLE, "nobody is beside it"
    assert book.note("dials", frozenset({"b"}), 0.013).verdict is Verdict.HELD, "L2 and bandwidth are shared"
    check = book.note("dials", frozenset({"b"}), 0.0196)
    assert check.verdict is Verdict.NOT_HELD
    assert check.observed == pytest.approx(1.96)
    assert "beside b" in check.reason


def test_other_dials_and_the_same_neighbours_are_no_reference() -> None:
    book = Contention()
    book.note("small batch", frozenset(), 0.001)
    check = book.note("large batch", frozenset({"b"}), 0.1)
    assert check.verdict is Verdict.NOT_OBSERVABLE
    assert "without b" in check.reason
    book.note("large batch", frozenset({"b", "c"}), 0.1)
    assert book.note("large batch", frozenset({"b"}), 0.1).verdict is Verdict.NOT_OBSERVABLE, "b was there each time"


def test_another_neighbour_is_a_reference_too_and_what_is_remembered_is_bounded() -> None:
    book = Contention()
    book.note("dials", frozenset({"quiet"}), 0.01)
    check = book.note("dials", frozenset({"loud"}), 0.01 * NEIGHBOUR_FACTOR * 1.1)
    assert check.verdict is Verdict.NOT_HELD
    for number in range(5 * MAX_CROWDS):
        book.note("dials", frozenset({str(number)}), 0.01)
        book.note(number, frozenset(), 0.01)
    assert len(book._known) <= 32
    assert all(len(crowds) <= MAX_CROWDS for crowds in book._known.values())
