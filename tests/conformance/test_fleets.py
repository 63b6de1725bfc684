"""What must hold of every policy in worlds whose trials may be placed, resized and paused."""

from __future__ import annotations

import dataclasses
import random

import pytest

from policies import POLICIES, build_policy
from policies.codec import dumps
from policies.goodput_joint import OBJECTIVES, GoodputJoint
from policies.invariants import check
from policies.plan import is_same
from policies.policy import Policy
from policies.sample_fleets import after, fleet_world

NUM_WORLDS = 100
RESTS = ("static", "goodput", "fifo", "goodput_joint")
"""Policies that leave an unchanged world alone; the others weigh anew each time, as their sources do."""


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return build_policy(request.param)


def test_no_policy_breaks_a_promise_a_quota_or_a_device_in_any_generated_fleet(policy: Policy) -> None:
    for seed in range(NUM_WORLDS):
        world = fleet_world(seed)
        violations = check(world, policy.decide(world))
        assert violations == (), f"seed {seed}: {[violation.text for violation in violations]}"


def test_the_order_of_a_fleet_does_not_matter_and_a_decision_repeats_to_the_byte(policy: Policy) -> None:
    for seed in range(NUM_WORLDS // 4):
        world, rng = fleet_world(seed), random.Random(seed)
        shuffled = dataclasses.replace(
            world,
            trials=tuple(rng.sample(world.trials, len(world.trials))),
            devices=tuple(rng.sample(world.devices, len(world.devices))),
        )
        assert dumps(policy.decide(shuffled)) == dumps(policy.decide(world)), f"seed {seed}"


@pytest.mark.parametrize("name", RESTS)
def test_in_an_unchanged_fleet_the_second_plan_equals_the_first(name: str) -> None:
    policy = build_policy(name)
    for seed in range(NUM_WORLDS):
        world = fleet_world(seed)
        first = policy.decide(world)
        assert is_same(first, policy.decide(after(world, first))), f"seed {seed}"


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
