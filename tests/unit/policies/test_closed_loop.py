"""The goodput policy against a synthetic world whose true speeds it has to find out."""

from __future__ import annotations

import dataclasses

from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import TrialId
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import SyntheticWorld, limits, trial

BOTH = (Tier.FP32, Tier.BF16)
FLOOR_S = {Tier.FP32: 0.02, Tier.BF16: 0.02}


def run(
    slope_of_bf16_s: float, *, num_trials: int = 3, seconds: int = 300, noise: float = 400.0
) -> tuple[SyntheticWorld, float]:
    """The world after `seconds`, and its true goodput under the start settings."""
    dials = limits(batches=(4, 256), tiers=BOTH)
    loop = SyntheticWorld(
        trials=[trial(f"t{index}", dials=dials) for index in range(num_trials)],
        policy=Goodput(),
        floor_s=FLOOR_S,
        slope_s={Tier.FP32: 0.004, Tier.BF16: slope_of_bf16_s},
        noise=noise,
    )
    loop.tick()
    start = loop.total()
    for _ in range(seconds):
        before = loop.snapshot()
        loop.tick()
        assert check(before, loop.policy.decide(before)) == ()
    return loop, start


def test_a_faster_tier_is_found_and_every_trial_of_the_shape_ends_in_it() -> None:
    loop, start = run(0.002)
    assert {row.settings.tier for row in loop.plan.allocations} == {Tier.BF16}
    assert loop.total() > 2 * start


def test_only_one_trial_explores_and_the_others_follow_its_measurement() -> None:
    loop, _ = run(0.002)
    explored = [change for change in loop.changes if "explores" in change[3]]
    assert [trial_id for _, trial_id, _, _ in explored] == [TrialId("t0")]
    assert "not yet measured" in explored[0][3]


def test_the_batch_ends_within_a_factor_two_of_the_best_one() -> None:
    loop, _ = run(0.002)
    for row in loop.plan.allocations:
        best = max(
            (loop.goodput(dataclasses.replace(row.settings, micro_batch=micro), 8), micro)
            for micro in (4, 8, 16, 32, 64)
        )
        assert loop.goodput(row.settings, 8) > 0.9 * best[0]
        assert best[1] / 2 <= row.settings.micro_batch <= best[1] * 2


def test_a_tier_that_measures_slower_is_left_again_and_not_tried_twice() -> None:
    loop, start = run(0.008)
    tier_changes = [change for change in loop.changes if "precision" in change[2]]
    assert {row.settings.tier for row in loop.plan.allocations} == {Tier.FP32}
    assert len(tier_changes) == 2, tier_changes
    assert "bf16 -> fp32" in tier_changes[1][3]
    assert loop.total() > start


def test_without_gradient_noise_the_batch_does_not_grow() -> None:
    loop, _ = run(0.004, noise=1.0)
    assert all(row.settings.global_batch <= 8 for row in loop.plan.allocations)


def test_a_settled_world_is_left_alone() -> None:
    loop, _ = run(0.002, seconds=400)
    settled_s = loop.now_s
    for _ in range(200):
        loop.tick()
    late = [change for change in loop.changes if change[0] > settled_s]
    assert len(late) <= 2, late


def test_batch_and_tier_of_a_trial_never_change_in_one_decision() -> None:
    loop, _ = run(0.002)
    assert any("batch" in change[2] for change in loop.changes)
    assert not any({"batch", "precision"} <= set(change[2]) for change in loop.changes)


def test_a_departure_gives_its_share_to_the_others_at_once() -> None:
    loop, _ = run(0.002, num_trials=2, seconds=60)
    assert max(row.settings.share for row in loop.plan.allocations) < 0.8
    loop.trials = loop.trials[1:]
    loop.tick()
    (row,) = loop.plan.allocations
    assert row.settings.share == 1.0
