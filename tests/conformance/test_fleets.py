"""What must hold of every policy in worlds whose trials may be placed, resized and paused."""

from __future__ import annotations

import pytest

from orchestrator.policies import POLICIES, build_policy
from orchestrator.policies.conformance import check_policy
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.decide.worth import OBJECTIVES
from orchestrator.policies.invariants import check
from orchestrator.policies.sample_fleets import after, fleet_world

NUM_WORLDS = 100
RESTS = ("static", "goodput", "fifo", "goodput_joint")
"""Policies that leave an unchanged world alone; the others weigh anew each time, as their sources do."""


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_keeps_the_contract_in_generated_fleets(name: str) -> None:
    """Legal, pure, repeatable to the byte, whatever the order; those that rest leave an unchanged fleet alone."""
    worlds = [fleet_world(seed) for seed in range(NUM_WORLDS)]
    findings = check_policy(build_policy(name), worlds, rests=name in RESTS, minutes=0)
    assert findings == (), "\n".join(str(finding) for finding in findings)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("uses_fractions", [False, True])
def test_goodput_joint_stays_legal_while_time_goes_on(objective: str, uses_fractions: bool) -> None:
    policy = GoodputJoint(objective=objective, uses_fractions=uses_fractions)
    for seed in range(NUM_WORLDS // 5):
        world = fleet_world(seed)
        for _ in range(4):
            plan = policy.decide(world)
            assert check(world, plan) == (), f"seed {seed}"
            world = after(world, plan, seconds=120.0)
