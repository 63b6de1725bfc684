"""Worlds by hand: what is known need not be measured, and accumulation has limits."""

from __future__ import annotations

import dataclasses
import json

import pytest

from orchestrator.policies import POLICIES, build_policy
from orchestrator.policies.codec import dumps, fit_from
from orchestrator.policies.decide.candidates import split_batch, worker_range
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, missing, noise_scale, predict_step_s, update
from orchestrator.policies.learn.known import known_fit
from orchestrator.policies.learn.speed import KnownLine, KnownSpeed
from orchestrator.policies.plan import EMPTY_PLAN, Allocation, DeviceId, Settings
from orchestrator.policies.sample_fleets import after
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import trial

START = Settings(share=1.0, micro_batch=32, grad_accum=1, tier=Tier.FP32, num_workers=1)
LIMITS = DialLimits(
    min_share=1.0,
    max_share=1.0,
    min_global_batch=32,
    max_global_batch=1024,
    max_micro_batch=64,
    tiers=(Tier.FP32,),
    can_pause=True,
    can_move=True,
    min_workers=1,
    max_workers=8,
)
SPEED = KnownSpeed(
    lines=(KnownLine(tier=Tier.FP32, floor_s=0.02, slope_s=0.001),),
    max_workers=8,
    sync_s=0.01,
    sync_rank_s=0.001,
    node_sync_s=0.03,
    gamma=2.0,
)


def view(name: str = "a", **limits: object) -> TrialView:
    dials = dataclasses.replace(LIMITS, **limits)  # type: ignore[arg-type]
    made = trial(name, start=START, dials=dials, placement=(), fit=known_fit(speed=SPEED, noise_scale=100_000.0))
    return dataclasses.replace(made, start=START, target_samples=None)


def world(*trials: TrialView, num_devices: int = 8) -> Snapshot:
    devices = tuple(
        DeviceView(device_id=DeviceId(f"gpu-{i}"), node_id=f"n{i // 4}", kind=DeviceKind.CUDA, units=1)
        for i in range(num_devices)
    )
    return Snapshot(now_s=1000.0, seed=0, plan=EMPTY_PLAN, devices=devices, trials=trials)


def only(snapshot: Snapshot, policy: str = "goodput_joint") -> Allocation:
    plan = build_policy(policy).decide(snapshot)
    assert check(snapshot, plan) == ()
    (row,) = plan.allocations
    return row


def test_a_known_speed_is_predicted_to_the_digit_without_any_observation() -> None:
    for workers, wait_s in ((1, 0.0), (2, 0.01), (4, 0.012)):
        found = predict_step_s(
            known_fit(speed=SPEED), cores=1.0, micro_batch=64, grad_accum=3, tier=Tier.FP32, num_workers=workers
        )
        assert found is not None
        assert found.step_s == pytest.approx(2 * 0.084 + (0.084**2 + wait_s**2) ** 0.5)
        assert found.is_measured
        assert found.rel_uncertainty == 0.0


def test_a_joint_decision_predicts_goodput_from_known_speed_and_noise() -> None:
    row = only(world(view()))
    settings = row.settings
    assert settings.num_workers == 8
    micro_s = 0.02 + 0.001 * settings.micro_batch
    step_s = (settings.grad_accum - 1) * micro_s + (micro_s**2 + 0.03**2) ** 0.5
    efficiency = (100_000 + 32) / (100_000 + settings.global_batch)
    assert row.predicted_goodput == pytest.approx(settings.global_batch / step_s * efficiency)


def test_known_speed_and_noise_turn_the_batch_of_a_trial_that_stays_where_it_is() -> None:
    still = dataclasses.replace(
        view(can_move=False, min_workers=None, max_workers=None), placement=(DeviceId("gpu-0"),)
    )
    now, goodput = world(still), build_policy("goodput")
    first = goodput.decide(now)
    (row,) = goodput.decide(after(now, first, seconds=100.0)).allocations
    assert row.settings.global_batch > START.global_batch


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_takes_a_world_of_known_speeds_and_unknown_lengths(policy: str) -> None:
    now, made = world(view("a"), view("b"), view("c")), build_policy(policy)
    for _ in range(3):
        plan = made.decide(now)
        assert check(now, plan) == ()
        now = after(now, plan, seconds=120.0)


def test_what_is_known_travels_in_a_journal() -> None:
    fit = known_fit(speed=SPEED, noise_scale=500.0)
    assert fit_from(json.loads(dumps(fit))) == fit
    assert "known_speed" not in dumps(NOTHING_FITTED)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_noise_scale_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"noise_scale=.*allowed"):
        known_fit(noise_scale=wrong)


@pytest.mark.parametrize(
    "change", [{"lines": ()}, {"max_workers": 0}, {"gamma": 0.5}, {"sync_s": -1.0}, {"node_sync_s": float("nan")}]
)
def test_a_speed_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        dataclasses.replace(SPEED, **change)  # type: ignore[arg-type]


def observed(num_steps: int) -> Observation:
    return Observation(
        cores=1.0, tier=Tier.FP32, micro_batch=32, grad_accum=1, num_workers=1, num_steps=num_steps, step_s=0.1,
        noise_trace=900.0, grad_sq=1.0, num_noise=3,
    )  # fmt: skip


def test_nothing_is_dropped_without_a_word() -> None:
    fit = update(NOTHING_FITTED, [observed(3)])
    assert missing(fit) == (
        "fp32 on 1 ranks at micro-batch 32 has 1 of 2 windows and 3 of 5 steps",
        "the noise scale has 3 of 10 estimates",
    )
    assert missing(update(fit, [observed(3)] * 3)) == ()
    assert missing(known_fit(speed=SPEED, noise_scale=900.0, fit=fit)) == ()
    assert noise_scale(known_fit(noise_scale=900.0, fit=fit)) == 900.0


def test_a_simulator_may_ask_that_impossible_observations_are_refused() -> None:
    assert update(NOTHING_FITTED, [observed(0)]) == NOTHING_FITTED
    with pytest.raises(ValueError, match="num_steps=0"):
        update(NOTHING_FITTED, [observed(0)], strict=True)


def test_a_batch_takes_no_more_accumulation_than_is_allowed() -> None:
    free, bound = (only(world(view(max_grad_accum=most, max_workers=2))).settings for most in (None, 2))
    assert free.grad_accum > 2
    assert bound.grad_accum <= 2


def test_without_accumulation_a_trial_has_the_ranks_that_reach_its_smallest_batch() -> None:
    large = view(min_global_batch=128, max_grad_accum=1)
    large = dataclasses.replace(large, start=dataclasses.replace(START, micro_batch=64, num_workers=2))
    assert worker_range(large) == (2, 8)
    assert len(only(world(large)).placement) >= 2
    assert only(world(large, num_devices=1)).placement == ()


def test_a_single_device_needs_two_micro_batches_above_the_batch_of_the_start() -> None:
    alone = view(max_workers=1, min_grad_accum_alone=2, max_micro_batch=512)
    settings = only(world(alone)).settings
    assert settings.global_batch > 32
    assert settings.grad_accum >= 2
    assert split_batch(alone, 32, 1) == (32, 1)
    assert split_batch(alone, 64, 1) == (32, 2)
    assert split_batch(alone, 64, 2) == (32, 1)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_accumulates_more_than_is_allowed(policy: str) -> None:
    trials = (view("a", max_grad_accum=1), view("b", max_grad_accum=2, min_global_batch=256))
    now, made = world(*trials), build_policy(policy)
    for _ in range(3):
        plan = made.decide(now)
        assert check(now, plan) == ()
        now = after(now, plan, seconds=120.0)


def test_more_accumulation_than_allowed_is_an_illegal_plan() -> None:
    now = world(view(max_grad_accum=2))
    plan = GoodputJoint().decide(now)
    (row,) = plan.allocations
    more = dataclasses.replace(row.settings, grad_accum=4, micro_batch=8)
    broken = dataclasses.replace(plan, allocations=(dataclasses.replace(row, settings=more),))
    assert "grad_accum" in {violation.code for violation in check(now, broken)}
