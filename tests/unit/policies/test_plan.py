from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.plan import EMPTY_PLAN, DeviceId, Effect, TrialId, changed_dials, diff, effect_of, is_same
from orchestrator.policies.tier import NAMED_TIERS, TIER_FACTS, Tier, is_cheaper
from tests.unit.policies.builders import DEVICE, in_force, settings, trial, world

ROWS = [trial("a"), trial("b")]
HALVES = {"a": 0.5, "b": 0.5}


def test_the_same_grants_are_the_same_plan_whatever_the_generation_and_reasons() -> None:
    plan = in_force(ROWS, HALVES)
    again = dataclasses.replace(plan, generation=type(plan.generation)(9), reason="another")
    assert is_same(plan, again)
    assert diff(plan, again) == ()


def test_a_changed_share_a_newcomer_and_a_departure_are_differences() -> None:
    plan = in_force(ROWS, HALVES)
    moved = in_force(ROWS, {"a": 0.4, "b": 0.5})
    assert [row.trial_id for row in diff(plan, moved)] == ["a"]
    assert [row.trial_id for row in diff(EMPTY_PLAN, plan)] == ["a", "b"]
    assert not is_same(plan, in_force(ROWS[:1], HALVES))


def test_only_another_number_of_workers_needs_a_restart() -> None:
    old = settings()
    assert effect_of(None, old) is Effect.NONE
    assert effect_of(old, old) is Effect.NONE
    assert effect_of(old, settings(tier=Tier.BF16)) is Effect.STEP
    assert effect_of(old, dataclasses.replace(old, num_workers=2)) is Effect.RESTART


def test_changed_dials_are_named_in_order() -> None:
    new = dataclasses.replace(settings(share=0.1, grad_accum=2, tier=Tier.BF16), num_workers=2)
    assert changed_dials(settings(), new) == ("share", "batch", "precision", "workers")
    assert changed_dials(settings(), settings()) == ()


def test_a_snapshot_finds_its_devices_by_id_and_refuses_others() -> None:
    snap = world(ROWS)
    assert snap.device(DEVICE).units == 2
    with pytest.raises(KeyError, match="gpu-9"):
        snap.device(DeviceId("gpu-9"))
    assert snap.settings_in_force(ROWS[0]) is None
    assert EMPTY_PLAN.allocation(TrialId("a")) is None


def test_the_tier_table_has_every_tier_dearest_first_with_a_dearer_fallback() -> None:
    assert tuple(TIER_FACTS) == NAMED_TIERS
    ranks = [facts.cost_rank for facts in TIER_FACTS.values()]
    assert ranks == sorted(set(ranks))
    for tier, facts in TIER_FACTS.items():
        assert facts.fallback is None or is_cheaper(tier, facts.fallback)
