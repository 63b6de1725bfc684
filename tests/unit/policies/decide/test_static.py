from __future__ import annotations

import pytest

from orchestrator.policies.decide.static import Static
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import Effect, Plan, Settings, TrialId
from orchestrator.policies.snapshot import Override, Snapshot
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import in_force, limits, measured, observation, settings, trial, world


def decide(snap: Snapshot, policy: Static | None = None) -> Plan:
    plan = (policy or Static()).decide(snap)
    assert check(snap, plan) == ()
    return plan


def shares(plan: Plan) -> dict[str, float]:
    return {row.trial_id: row.settings.share for row in plan.allocations}


def granted(plan: Plan, name: str) -> Settings:
    row = plan.allocation(TrialId(name))
    assert row is not None
    return row.settings


def test_an_empty_world_gives_an_empty_plan() -> None:
    assert decide(world([])).allocations == ()


def test_start_shares_that_fit_are_granted_whole() -> None:
    plan = decide(world([trial("a", start=settings(share=0.3)), trial("b", start=settings(share=0.6))]))
    assert shares(plan) == {"a": 0.3, "b": 0.6}
    assert all(row.effect is Effect.NONE for row in plan.allocations)


def test_start_shares_that_do_not_fit_are_scaled_by_one_factor() -> None:
    plan = decide(world([trial("a", start=settings(share=1.0)), trial("b", start=settings(share=0.5))]))
    assert shares(plan) == {"a": pytest.approx(2 / 3, abs=1e-5), "b": pytest.approx(1 / 3, abs=1e-5)}
    assert "do not fit" in plan.allocations[0].reason


def test_nobody_is_scaled_below_the_minimum() -> None:
    small = trial("a", start=settings(share=0.3), dials=limits(shares=(0.3, 1.0)))
    plan = decide(world([small, trial("b", start=settings(share=1.0)), trial("c", start=settings(share=1.0))]))
    assert shares(plan) == {"a": 0.3, "b": 0.35, "c": 0.35}


def test_a_start_share_outside_the_limits_is_brought_inside() -> None:
    plan = decide(world([trial("a", start=settings(share=0.9), dials=limits(shares=(0.1, 0.5)))]))
    assert shares(plan) == {"a": 0.5}


def test_batch_and_tier_stay_at_the_start_whatever_was_measured() -> None:
    fit = measured(observation(0.1, noise=(1e6, 1.0)), observation(0.01, tier=Tier.BF16))
    row = trial("a", fit=fit, dials=limits(batches=(1, 64), tiers=(Tier.FP32, Tier.BF16)))
    plan = decide(world([row], plan=in_force([row], {"a": 0.5})))
    assert granted(plan, "a") == row.start


def test_what_a_trial_fled_to_stays() -> None:
    fled = settings(micro_batch=4, grad_accum=2)
    row = trial("a", override=Override(number=1, generation=1, settings=fled, reason="memory"))
    plan = decide(world([row], plan=in_force([row], {"a": 0.5})))
    assert granted(plan, "a") == fled
    assert plan.allocations[0].effect is Effect.NONE


def test_a_trial_that_paused_itself_rests_and_is_then_resumed() -> None:
    override = Override(number=1, generation=1, settings=settings(share=0.0), reason="memory")
    row = trial("a", override=override, changed_at_s=90.0)
    in_rest = world([row], plan=in_force([row], {"a": 0.5}), now_s=100.0)
    assert shares(decide(in_rest)) == {"a": 0.0}
    rested = world([row], plan=in_force([row], {"a": 0.5}), now_s=120.1)
    plan = decide(rested)
    assert shares(plan) == {"a": 0.5}
    assert plan.allocations[0].effect is Effect.STEP


def test_a_paused_trial_without_telemetry_is_resumed_all_the_same() -> None:
    row = trial("a", is_stale=True)
    assert shares(decide(world([row], plan=in_force([row], {"a": 0.0})))) == {"a": 0.5}


def test_a_stale_trial_keeps_its_share_until_a_newcomer_needs_its_minimum() -> None:
    stale = trial("a", start=settings(share=1.0), is_stale=True)
    plan = in_force([stale], {"a": 0.8})
    modest = trial("b", dials=limits(shares=(0.1, 0.2)))
    assert shares(decide(world([stale, modest], plan=plan))) == {"a": 0.8, "b": 0.2}
    demanding = trial("b", dials=limits(shares=(0.4, 1.0)))
    squeezed = shares(decide(world([stale, demanding], plan=plan)))
    assert squeezed["b"] >= 0.4
    assert sum(squeezed.values()) <= 1


def test_the_lightest_and_youngest_that_may_pause_does_where_the_minima_do_not_fit() -> None:
    dials = limits(shares=(0.4, 1.0), can_pause=True)
    rows = [trial("a", dials=dials), trial("b", dials=dials, weight=0.5), trial("c", dials=limits(shares=(0.4, 1.0)))]
    plan = decide(world(rows))
    assert granted(plan, "b").share == 0
    assert "minima" in plan.allocations[1].reason
    assert granted(plan, "a").share >= 0.4


def test_one_pause_too_many_is_taken_back() -> None:
    rows = [
        trial("a", dials=limits(shares=(0.2, 1.0), can_pause=True), weight=0.5),
        trial("b", dials=limits(shares=(0.5, 1.0), can_pause=True)),
        trial("c", dials=limits(shares=(0.8, 1.0))),
    ]
    plan = decide(world(rows))
    assert granted(plan, "a").share == pytest.approx(0.2)
    assert granted(plan, "b").share == 0


def test_predictions_are_shown_where_something_is_measured() -> None:
    row = trial("a", fit=measured(observation(0.1)))
    plan = decide(world([row], plan=in_force([row], {"a": 0.25})))
    assert plan.allocations[0].predicted_goodput == pytest.approx(80.0)
    assert plan.allocations[0].predicted_gain == pytest.approx(1.0)


def test_a_negative_rest_is_refused() -> None:
    with pytest.raises(ValueError, match="pause_s=-1"):
        Static(pause_s=-1)
