"""No policy breaks a promise while a fleet goes on by chance; `bench_random_steps` takes many more steps."""

from __future__ import annotations

import pytest

from orchestrator.policies import POLICIES, build_policy
from orchestrator.policies.codec import dumps
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.decide.worth import OBJECTIVES
from orchestrator.policies.invariants import check
from orchestrator.policies.policy import Policy
from orchestrator.policies.sample_fleets import walk
from tests.unit.policies.promises import broken_promises

NUM_STEPS = 80
CASES: dict[str, Policy] = {
    **{name: build_policy(name) for name in sorted(POLICIES)},
    **{f"goodput_joint, {objective}, fractions": GoodputJoint(objective=objective, uses_fractions=True, cooldown_s=0.0)
       for objective in OBJECTIVES},
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES))
def test_no_promise_is_broken_while_a_fleet_goes_on_by_chance(case: str) -> None:
    for step, (world, plan) in enumerate(walk(CASES[case], seed=len(case), num_steps=NUM_STEPS)):
        assert broken_promises(world, plan) == [], f"step {step}"
        assert check(world, plan) == (), f"step {step}"


def test_a_walk_is_the_same_for_the_same_seed_and_has_everything_in_it() -> None:
    policy = build_policy("fair_share")
    worlds = [world for world, _ in walk(policy, seed=1, num_steps=400)]
    assert dumps(worlds[-1]) == dumps([world for world, _ in walk(policy, seed=1, num_steps=400)][-1])
    trials = [trial for world in worlds for trial in world.trials]
    assert any(world.quotas for world in worlds)
    assert any(trial.override is not None for trial in trials)
    assert any(trial.guaranteed and trial.placement for trial in trials)
    assert any(trial.is_protected and trial.placement for trial in trials)
    assert len({len(world.devices) for world in worlds}) > 3
