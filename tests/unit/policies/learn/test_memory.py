"""The memory model: lines through measured peaks, and what policies make of them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.decide.static import Static
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import (
    CAP_OBSERVATIONS,
    NOTHING_FITTED,
    Observation,
    TrialFit,
    capped,
    inherit,
    pool,
    update,
)
from orchestrator.policies.learn.memory import (
    MARGIN_RATIO,
    MemoryPoint,
    fits,
    largest_micro_batch,
    largest_split,
    merge,
    remember,
    solve_line,
)
from orchestrator.policies.plan import Settings
from orchestrator.policies.policy import Policy
from orchestrator.policies.snapshot import TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import in_force, limits, measured, observation, settings, trial, world


def point(micro_batch: int, peak_bytes: int, tier: Tier = Tier.FP32, num_workers: int = 1) -> MemoryPoint:
    return MemoryPoint(tier=tier, num_workers=num_workers, micro_batch=micro_batch, peak_bytes=peak_bytes)


def observed(micro_batch: int, memory_bytes: int | None, tier: Tier = Tier.FP32) -> Observation:
    return Observation(
        cores=1.0,
        tier=tier,
        micro_batch=micro_batch,
        grad_accum=1,
        num_workers=1,
        num_steps=10,
        step_s=0.1,
        memory_bytes=memory_bytes,
    )


@given(
    fixed=st.integers(0, 2**34),
    per_sample=st.integers(1, 2**30),
    sizes=st.sets(st.integers(1, 256), min_size=2, max_size=6),
    micro_batch=st.integers(1, 4096),
)
def test_two_sizes_give_the_line_and_its_margin(fixed: int, per_sample: int, sizes: set[int], micro_batch: int) -> None:
    line = solve_line([point(m, fixed + per_sample * m) for m in sizes], Tier.FP32, 1)
    assert line is not None
    truth = fixed + per_sample * micro_batch
    assert line.needed_bytes(micro_batch) >= truth * (1 + MARGIN_RATIO) * (1 - 1e-6)
    if micro_batch <= max(sizes):
        assert line.needed_bytes(micro_batch) <= truth * (1 + MARGIN_RATIO) * (1 + 1e-6) + 1


def test_no_point_lies_above_its_line() -> None:
    points = [point(2, 130), point(4, 150), point(8, 260)]
    line = solve_line(points, Tier.FP32, 1)
    assert line is not None
    assert all(line.fixed_bytes + line.sample_bytes * p.micro_batch >= p.peak_bytes - 1e-9 for p in points)


def test_one_size_alone_overrates_a_larger_one_unless_what_is_fixed_is_known() -> None:
    line = solve_line([point(4, 400)], Tier.FP32, 1)
    known = solve_line([point(4, 400)], Tier.FP32, 1, fixed_bytes=200.0)
    assert line is not None
    assert known is not None
    assert (line.fixed_bytes, line.sample_bytes) == (0.0, 100.0)
    assert (known.fixed_bytes, known.sample_bytes) == (200.0, 50.0)


def test_an_unmeasured_tier_borrows_the_hungriest_line_and_other_group_sizes_do_not_count() -> None:
    points = [point(4, 400), point(4, 300, Tier.BF16), point(4, 9999, num_workers=2)]
    assert solve_line(points[1:], Tier.FP32, 1) == solve_line(points[1:2], Tier.BF16, 1)
    assert solve_line(points, Tier.BF16, 3) is None
    assert fits(points, Tier.FP32, 3, 10**6, 1)


@given(limit=st.integers(1, 5000), at_most=st.integers(1, 300))
def test_the_largest_micro_batch_fits_and_the_next_does_not(limit: int, at_most: int) -> None:
    line = solve_line([point(2, 120), point(8, 180)], Tier.FP32, 1)
    assert line is not None
    found = largest_micro_batch(line, limit, at_most)
    assert found == 0 or line.needed_bytes(found) <= limit
    assert found == at_most or line.needed_bytes(found + 1) > limit


@given(per_rank=st.integers(1, 500), at_most=st.integers(1, 500))
def test_a_split_keeps_the_global_batch(per_rank: int, at_most: int) -> None:
    size = largest_split(per_rank, at_most)
    assert per_rank % size == 0
    assert 1 <= size <= max(1, at_most)


def test_a_new_peak_counts_and_an_old_one_is_forgotten_slowly() -> None:
    points = remember((), point(4, 1000))
    assert remember(points, point(4, 1200)) == (point(4, 1200),)
    assert remember(points, point(4, 500)) == (point(4, 970),)
    many: tuple[MemoryPoint, ...] = ()
    for size in range(1, 60):
        many = remember(many, point(size, size))
    assert len(many) == 24


def test_fits_of_one_shape_share_what_was_measured() -> None:
    one = update(NOTHING_FITTED, [observed(4, 400), observed(8, None)])
    two = update(NOTHING_FITTED, [observed(4, 450), observed(16, 900)])
    assert one.memory == (point(4, 400),)
    assert pool([one, two]).memory == pool([two, one]).memory == (point(4, 450), point(16, 900))
    assert inherit(two).memory == two.memory
    assert merge([one.memory, two.memory]) == (point(4, 450), point(16, 900))


@pytest.mark.parametrize("num_overflows", [0, 1, 3])
def test_a_cap_is_lifted_after_a_while_and_later_each_time(num_overflows: int) -> None:
    fit = capped(TrialFit(num_overflows=num_overflows), 8)
    assert (fit.micro_batch_cap, fit.num_overflows) == (8, num_overflows + 1)
    wait = CAP_OBSERVATIONS * 2**num_overflows
    fit = update(fit, [observed(8, None)] * (wait - 1))
    assert fit.micro_batch_cap == 8
    fit = update(fit, [observed(8, None)])
    assert (fit.micro_batch_cap, fit.cap_until) == (None, 0)
    assert fit.num_overflows == num_overflows + 1, "the next cap lasts longer"


def test_a_second_overflow_lowers_the_cap() -> None:
    assert capped(capped(NOTHING_FITTED, 8), 4).micro_batch_cap == 4
    assert capped(capped(NOTHING_FITTED, 4), 8).micro_batch_cap == 4
    assert dataclasses.replace(NOTHING_FITTED, micro_batch_cap=4, cap_until=2).micro_batch_cap == 4


def with_peaks(*seen: Observation) -> TrialFit:
    """Twice the samples cost 1.2 times the step, the noise is large, and memory was measured."""
    fit = measured(observation(0.10, noise=(1000.0, 1.0)), observation(0.12, micro_batch=16, noise=(1000.0, 1.0)))
    return update(fit, seen)


def granted(limit_bytes: int, start: Settings | None = None, resume: Settings | None = None) -> TrialView:
    fit = with_peaks(observed(8, 180), observed(4, 140))
    row = trial("a", fit=fit, start=start, dials=limits(batches=(8, 64)))
    return dataclasses.replace(row, memory_limit_bytes=limit_bytes, resume=resume)


def test_a_larger_batch_is_taken_only_where_it_fits() -> None:
    for limit, micro_batch, binding in (
        (1000, 16, "one change at a time"),
        (250, 12, "one change at a time"),
        (200, 8, "memory"),
        (0, 16, "one change at a time"),
    ):
        row = granted(limit)
        snap = world([row], plan=in_force([row], {row.trial_id: 1.0}))
        (allocation,) = Goodput().decide(snap).allocations
        assert (allocation.settings.micro_batch, allocation.binding) == (micro_batch, binding)
    row = granted(200)
    (allocation,) = Goodput().decide(world([row], plan=in_force([row], {row.trial_id: 1.0}))).allocations
    assert "micro-batch 16 in fp32 would gain" in allocation.reason
    assert "GiB per rank" in allocation.reason


def test_a_tier_that_would_not_fit_is_not_tried() -> None:
    for limit, tier in ((1000, Tier.BF16), (150, Tier.FP32)):
        fit = update(measured(observation(0.1)), [observed(8, 180), observed(4, 140)])
        row = trial("a", fit=fit, dials=limits(tiers=(Tier.FP32, Tier.BF16)))
        row = dataclasses.replace(row, memory_limit_bytes=limit)
        (allocation,) = Goodput().decide(world([row], plan=in_force([row], {row.trial_id: 1.0}))).allocations
        assert allocation.settings.tier is tier


@pytest.mark.parametrize("policy", [Static(), FairShare(), Goodput()])
def test_a_new_trial_is_cut_into_micro_batches_that_fit(policy: Policy) -> None:
    row = granted(195, start=settings(micro_batch=32))
    (allocation,) = policy.decide(world([row])).allocations
    assert (allocation.settings.micro_batch, allocation.settings.grad_accum) == (8, 4)
    assert check(world([row]), policy.decide(world([row]))) == ()


@pytest.mark.parametrize("policy", [Static(), FairShare(), Goodput()])
def test_a_restarted_trial_begins_with_the_dials_it_brought(policy: Policy) -> None:
    row = granted(0, resume=settings(micro_batch=4, grad_accum=4))
    (allocation,) = policy.decide(world([row])).allocations
    assert (allocation.settings.micro_batch, allocation.settings.grad_accum) == (4, 4)
