"""What the joint decision makes of waiting, restarts and unknown lengths."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.decide.worth import OBJECTIVES
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import Observation, TrialFit, update
from orchestrator.policies.plan import EMPTY_PLAN, DeviceId, Settings
from orchestrator.policies.sample_fleets import after
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Quota, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import trial

NUM_DEVICES = 64
START = Settings(share=1.0, micro_batch=32, grad_accum=1, tier=Tier.FP32, num_workers=1)
LIMITS = DialLimits(
    min_share=1.0,
    max_share=1.0,
    min_global_batch=32,
    max_global_batch=4096,
    max_micro_batch=64,
    tiers=(Tier.FP32,),
    can_pause=True,
    can_move=True,
    min_workers=1,
    max_workers=64,
)


def fit(step_s: float, most: int) -> TrialFit:
    """Measured on one rank up to `most`; waiting for each other takes a tenth of a step."""
    seen = [
        Observation(
            cores=16.0,
            tier=Tier.FP32,
            micro_batch=32,
            grad_accum=1,
            num_workers=workers,
            num_steps=10,
            step_s=step_s * (1.0 if workers == 1 else 1.1),
            noise_trace=50_000.0,
            grad_sq=1.0,
            num_noise=10,
            num_nodes=max(1, workers // 4),
        )
        for workers in (1, 2, 4, 8, 16, 32, 64)
        if workers <= most
        for _ in range(3)
    ]
    return update(TrialFit(), seen)


def view(name: str, length_s: float, *, most: int = 64, **changes: object) -> TrialView:
    """A trial that takes `length_s` alone on one device."""
    made = trial(name, start=START, dials=dataclasses.replace(LIMITS, max_workers=most), placement=(), shape=name[:5])
    made = dataclasses.replace(
        made,
        start=START,
        fit=fit(0.1, most),
        target_samples=round(length_s * 320),
        num_samples=0,
        restart_s=30.0,
        began_at_s=0.0,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def world(*trials: TrialView, now_s: float = 1000.0) -> Snapshot:
    devices = tuple(
        DeviceView(device_id=DeviceId(f"gpu-{i:02d}"), node_id=f"node-{i // 4:02d}", kind=DeviceKind.CUDA, units=16)
        for i in range(NUM_DEVICES)
    )
    return Snapshot(now_s=now_s, seed=0, plan=EMPTY_PLAN, devices=devices, trials=trials)


def with_giant(policy: GoodputJoint, *small: TrialView, knows_lengths: bool, held_s: float = 600.0) -> Snapshot:
    """A world where one trial of many hours has held all devices for a while when small ones come."""
    giant = view("giant", 500_000.0)
    first = world(giant)
    held = after(first, policy.decide(first), seconds=held_s)
    came = tuple(dataclasses.replace(each, changed_at_s=held.now_s, began_at_s=held.now_s) for each in small)
    trials = (dataclasses.replace(held.trials[0], num_samples=5_000_000, attained_s=64 * held_s), *came)
    if not knows_lengths:
        trials = tuple(dataclasses.replace(each, target_samples=None) for each in trials)
    return dataclasses.replace(held, trials=trials)


def num_held(policy: GoodputJoint, now: Snapshot) -> dict[str, int]:
    plan = policy.decide(now)
    assert check(now, plan) == ()
    return {row.trial_id: len(row.placement) for row in plan.allocations}


@pytest.mark.parametrize("knows_lengths", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("held_s", [90.0, 600.0, 20_000.0])
def test_nobody_waits_longer_than_five_minutes_behind_one_holder(
    objective: str, knows_lengths: bool, held_s: float
) -> None:
    """Three trials of 75 s beside one that held 64 devices once waited for half an hour."""
    policy = GoodputJoint(objective=objective)
    small = [view(f"small-{i}", 75.0, most=1) for i in range(3)]
    now = with_giant(policy, *small, knows_lengths=knows_lengths, held_s=held_s)
    arrived_s = now.now_s
    while not all(held for name, held in num_held(policy, now).items() if name != "giant"):
        now = after(now, policy.decide(now), seconds=60.0)
        assert now.now_s - arrived_s <= 300.0


@pytest.mark.parametrize("knows_lengths", [True, False])
def test_a_holder_gives_up_no_more_devices_than_others_take(knows_lengths: bool) -> None:
    """It once went from 64 to 48 for three trials on one device each."""
    policy = GoodputJoint()
    small = [view(f"small-{i}", 75.0, most=1) for i in range(3)]
    now = with_giant(policy, *small, knows_lengths=knows_lengths)
    for _ in range(5):
        now = after(now, policy.decide(now), seconds=60.0)
    assert {name: held for name, held in num_held(policy, now).items()} == {
        "giant": 61, "small-0": 1, "small-1": 1, "small-2": 1
    }  # fmt: skip


def test_a_trial_of_lower_priority_waits_behind_a_holder_for_as_long_as_that_runs() -> None:
    policy = GoodputJoint()
    small = [view(f"small-{i}", 75.0, most=1) for i in range(3)]
    now = with_giant(policy, *small, knows_lengths=True)
    trials = (dataclasses.replace(now.trials[0], priority=1), *now.trials[1:])
    now = dataclasses.replace(now, trials=trials)
    for _ in range(10):
        now = after(now, policy.decide(now), seconds=60.0)
    assert num_held(policy, now) == {"giant": 64, "small-0": 0, "small-1": 0, "small-2": 0}


def test_a_user_at_the_quota_is_not_served_beyond_it_however_long_a_trial_waits() -> None:
    policy = GoodputJoint()
    small = [view(f"small-{i}", 75.0, most=1, user="ann") for i in range(3)]
    now = with_giant(policy, *small, knows_lengths=True)
    now = dataclasses.replace(now, quotas=(Quota(user="ann", max_devices=2.0),))
    for _ in range(6):
        now = after(now, policy.decide(now), seconds=60.0)
    assert sum(held for name, held in num_held(policy, now).items() if name != "giant") == 2


def test_a_long_trial_waits_for_shorter_ones_on_purpose() -> None:
    """Sixty-four short trials on one device each come before the long one, which waits as long as they take."""
    policy = GoodputJoint()
    short = [view(f"short-{i:02d}", 2_000.0, most=1) for i in range(64)]
    now = world(view("giant", 500_000.0), *short)
    for _ in range(10):
        now = after(now, policy.decide(now), seconds=60.0)
    assert num_held(policy, now)["giant"] == 0


def test_where_no_length_is_known_the_small_are_not_starved_by_who_scales_best() -> None:
    """Sixteen trials that scale to eight devices come to one that scales to all: it keeps no more than they have."""
    policy = GoodputJoint(cooldown_s=0.0)
    small = [view(f"small-{i:02d}", 2_000.0, most=8) for i in range(16)]
    now = with_giant(policy, *small, knows_lengths=False)
    for _ in range(4):
        now = after(now, policy.decide(now), seconds=60.0)
    held = num_held(policy, now)
    giant = held.pop("giant")
    assert min(held.values()) >= 2
    assert giant <= 8


def test_a_trial_of_unknown_length_that_nobody_measured_counts_as_one_that_begins_and_not_as_half_done() -> None:
    """Where devices are short, it comes before trials that have computed for long."""
    old = [view(f"old-{i:03d}", 50_000.0, most=1, target_samples=None, num_samples=10**7) for i in range(80)]
    new = view("young", 50.0, most=1, target_samples=None, fit=TrialFit())
    assert num_held(GoodputJoint(), world(*old, new))["young"] == 1


def test_two_trials_of_unknown_length_that_have_done_as_much_get_as_much() -> None:
    twins = [view(name, 500_000.0, target_samples=None, num_samples=10**6) for name in ("twin-a", "twin-b")]
    held = num_held(GoodputJoint(), world(*twins))
    assert held["twin-a"] == held["twin-b"] == 32


def test_with_some_lengths_unknown_a_trial_known_to_be_short_still_comes_first() -> None:
    known = view("known", 60.0, most=1)
    others = [view(f"other-{i:03d}", 1.0, most=1, target_samples=None, num_samples=10**6) for i in range(70)]
    assert num_held(GoodputJoint(), world(known, *others))["known"] == 1
