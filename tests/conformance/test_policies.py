from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest

from orchestrator.policies import POLICIES, build_policy
from orchestrator.policies.conformance import check_policy
from orchestrator.policies.policy import Policy
from orchestrator.policies.sample_worlds import snapshot, snapshots

NUM_WORLDS = 1_000


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return build_policy(request.param)


def test_every_policy_keeps_the_contract_in_generated_worlds(policy: Policy) -> None:
    """Legal, pure, repeatable to the byte, whatever the order, and at rest when nothing is learned any more."""
    findings = check_policy(policy, snapshots(NUM_WORLDS))
    assert findings == (), "\n".join(str(finding) for finding in findings)


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
