"""Movable trials try tiers that nobody measured, one at a time, and never where that is not safe."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import Observation, TrialFit, update
from orchestrator.policies.learn.memory import MemoryPoint
from orchestrator.policies.learn.tier_fit import TierFit
from orchestrator.policies.plan import Effect, Plan, Settings
from orchestrator.policies.sample_fleets import after
from orchestrator.policies.snapshot import Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.decide.test_goodput_joint import UNITS, candidate, fit, world

POLICY = GoodputJoint(cooldown_s=60.0)
LADDER = (Tier.FP32, Tier.BF16, Tier.INT8)


def with_tiers(name: str, tiers: tuple[Tier, ...] = LADDER, **changes: object) -> TrialView:
    view = candidate(name, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(view, limits=dataclasses.replace(view.limits, tiers=tiers, max_workers=1))


def settled(*trials: TrialView, seconds: float = 1000.0) -> Snapshot:
    """The world some time after everybody began on a device."""
    first = world(*trials)
    plan = POLICY.decide(first)
    assert tiers_of(plan) == {trial.trial_id: Tier.FP32 for trial in trials}
    return after(first, plan, seconds=seconds)


def decide(snapshot: Snapshot) -> Plan:
    plan = POLICY.decide(snapshot)
    assert check(snapshot, plan) == ()
    return plan


def tiers_of(plan: Plan) -> dict[str, Tier]:
    return {row.trial_id: row.settings.tier for row in plan.allocations}


def measured(known: TrialFit, settings: Settings, speed: float) -> TrialFit:
    """The fit after three windows in a tier that is so many times as fast as fp32."""
    seen = Observation(
        cores=UNITS * settings.share,
        tier=settings.tier,
        micro_batch=settings.micro_batch,
        grad_accum=settings.grad_accum,
        num_workers=1,
        num_steps=10,
        step_s=(0.02 + 0.01 * settings.micro_batch) * settings.grad_accum / speed,
    )
    return update(known, [seen] * 3)


def learned(snapshot: Snapshot, plan: Plan, speed: float) -> Snapshot:
    """The world once the trial that explored has measured its tier."""
    later = after(snapshot, plan, seconds=1000.0)
    rows = {row.trial_id: row.settings for row in plan.allocations}
    trials = tuple(
        dataclasses.replace(trial, fit=measured(trial.fit, rows[trial.trial_id], speed))
        if rows[trial.trial_id].tier is not Tier.FP32
        else trial
        for trial in later.trials
    )
    return dataclasses.replace(later, trials=trials)


def test_one_trial_of_a_shape_tries_the_next_tier_live_and_nothing_else_changes() -> None:
    snapshot = settled(with_tiers("a"), with_tiers("b"))
    plan = decide(snapshot)
    assert tiers_of(plan) == {"a": Tier.BF16, "b": Tier.FP32}
    row, old = plan.allocations[0], snapshot.plan.allocations[0]
    assert (row.effect, row.binding, row.cost_s, row.placement) == (Effect.STEP, "exploring", 0.0, old.placement)
    assert dataclasses.replace(row.settings, tier=Tier.FP32) == old.settings


def test_each_shape_has_its_own() -> None:
    snapshot = settled(with_tiers("a"), with_tiers("b", shape="two"))
    assert tiers_of(decide(snapshot)) == {"a": Tier.BF16, "b": Tier.BF16}


def test_it_is_kept_until_it_is_measured() -> None:
    snapshot = settled(with_tiers("a"), with_tiers("b"))
    plan = decide(snapshot)
    for seconds in (1.0, 1000.0):
        assert tiers_of(decide(after(snapshot, plan, seconds=seconds))) == {"a": Tier.BF16, "b": Tier.FP32}


def test_a_faster_tier_is_taken_by_all_and_then_the_next_one_is_tried() -> None:
    snapshot = settled(with_tiers("a"), with_tiers("b"))
    later = learned(snapshot, decide(snapshot), 1.5)
    taken = decide(later)
    assert tiers_of(taken)["b"] is Tier.BF16
    rest = dataclasses.replace(after(later, taken, seconds=1000.0), trials=after(later, taken).trials)
    assert Tier.INT8 in {*tiers_of(taken).values(), *tiers_of(decide(rest)).values()}


@pytest.mark.parametrize(("speed", "stays"), [(0.8, False), (1.02, True), (0.98, True)])
def test_a_slower_tier_is_left_and_one_that_is_about_as_fast_changes_nothing(speed: float, stays: bool) -> None:
    two = (Tier.FP32, Tier.BF16)
    snapshot = settled(with_tiers("a", two), with_tiers("b", two))
    expected = {"a": Tier.BF16 if stays else Tier.FP32, "b": Tier.FP32}
    assert tiers_of(decide(learned(snapshot, decide(snapshot), speed))) == expected


def test_not_within_the_cooldown_of_a_change() -> None:
    assert set(tiers_of(decide(settled(with_tiers("a"), seconds=30.0))).values()) == {Tier.FP32}


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": dataclasses.replace(fit(), banned_tiers=(Tier.BF16, Tier.INT8))},
        {"fit": dataclasses.replace(fit(), tiers=(TierFit(tier=Tier.BF16, is_real=False, is_safe=True),))},
        {"fit": dataclasses.replace(fit(), tiers=(TierFit(tier=Tier.BF16, is_real=True, is_safe=False),))},
        {
            "fit": dataclasses.replace(
                fit(), memory=(MemoryPoint(tier=Tier.FP32, num_workers=1, micro_batch=16, peak_bytes=1000),)
            ),
            "memory_limit_bytes": 500,
        },
        {"is_protected": True},
        {"is_stale": True},
    ],
)
def test_never_a_tier_it_fled_from_or_has_no_room_for_nor_with_a_guard_nor_one_that_has_to_stay(
    changes: dict[str, object],
) -> None:
    snapshot = settled(with_tiers("a"))
    trials = tuple(dataclasses.replace(trial, **changes) for trial in snapshot.trials)  # type: ignore[arg-type]
    assert tiers_of(decide(dataclasses.replace(snapshot, trials=trials))) == {"a": Tier.FP32}


def test_a_dearer_tier_is_not_explored() -> None:
    assert tiers_of(decide(settled(with_tiers("a", (Tier.FP32,))))) == {"a": Tier.FP32}
