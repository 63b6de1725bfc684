from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from policies import POLICIES, build_policy
from policies.codec import dumps
from policies.invariants import check
from policies.plan import is_same
from policies.policy import Policy
from policies.sample_worlds import after, snapshot, snapshots

NUM_WORLDS = 1_000


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return build_policy(request.param)


def test_no_policy_breaks_an_invariant_in_any_generated_world(policy: Policy) -> None:
    for world in snapshots(NUM_WORLDS):
        violations = check(world, policy.decide(world))
        assert violations == (), f"seed {world.seed}: {[violation.text for violation in violations]}"


def test_a_policy_decides_the_same_thing_twice_to_the_byte(policy: Policy) -> None:
    for world in snapshots(NUM_WORLDS // 4):
        assert dumps(policy.decide(world)) == dumps(policy.decide(snapshot(world.seed)))


def test_the_order_of_trials_and_devices_does_not_matter(policy: Policy) -> None:
    for world in snapshots(NUM_WORLDS // 4):
        rng = random.Random(world.seed)
        shuffled = dataclasses.replace(
            world,
            trials=tuple(rng.sample(world.trials, len(world.trials))),
            devices=tuple(rng.sample(world.devices, len(world.devices))),
        )
        assert dumps(policy.decide(shuffled)) == dumps(policy.decide(world)), f"seed {world.seed}"


def test_in_an_unchanged_world_the_second_plan_equals_the_first(policy: Policy) -> None:
    for world in snapshots(NUM_WORLDS):
        first = policy.decide(world)
        second = policy.decide(after(world, first))
        assert is_same(first, second), f"seed {world.seed}"


def test_a_policy_comes_to_rest_when_nothing_is_learned_any_more(policy: Policy) -> None:
    for world in snapshots(NUM_WORLDS // 4):
        for _ in range(14):  # eight doublings, a pause, a tier, a division: each at most once a minute
            plan = policy.decide(world)
            assert check(world, plan) == (), f"seed {world.seed}"
            world = after(world, plan, seconds=60.0)  # noqa: PLW2901 -- the world moves on
        assert is_same(plan, policy.decide(world)), f"seed {world.seed}"


def test_trials_without_an_override_keep_their_number_of_workers(policy: Policy) -> None:
    for world in snapshots(100):
        plan = policy.decide(world)
        for trial, allocation in zip(world.trials, plan.allocations, strict=True):
            assert allocation.settings.num_workers == len(trial.placement)


def test_every_allocation_says_why_with_a_number(policy: Policy) -> None:
    for world in snapshots(200):
        for allocation in policy.decide(world).allocations:
            assert any(character.isdigit() for character in allocation.reason), allocation.reason


@pytest.mark.parametrize("num_trials", [100])
def test_work_grows_gently_with_the_number_of_trials(policy: Policy, num_trials: int) -> None:
    small = _num_calls(policy.decide, num_trials // 10)
    large = _num_calls(policy.decide, num_trials)
    assert large < 30 * small
    assert large < 10_000 * num_trials


def _num_calls(decide: Callable[..., object], num_trials: int) -> int:
    """Python and C calls made by one decision on a device per four trials: work, not time."""
    world = snapshot(1, num_trials=num_trials, num_devices=max(1, num_trials // 4))
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        decide(world)
    finally:
        sys.setprofile(before)
    return count
