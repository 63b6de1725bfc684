"""The guard as a state machine: numbers in, moves out."""

from __future__ import annotations

import math

import pytest

from orchestrator.policies.tier import Tier
from orchestrator.train.precision.guard import Cause, Guard, Move, Probe, StepSigns

LADDER = tuple(Tier(word) for word in ("fp32", "bf16", "fp16", "int8", "fixed(4,8,floor)"))
FP32, BF16, FP16, INT8, FLOOR = LADDER
COSTS = dict(zip(LADDER, (1.0, 0.6, 0.55, 0.4, 0.2), strict=True))
GOOD = Probe(noise_ratio=0.001, norm_ratio=1.0, loss_gap=0.0)
FAIR = Probe(noise_ratio=0.03, norm_ratio=1.0, loss_gap=0.0)
BAD = Probe(noise_ratio=0.2, norm_ratio=1.0, loss_gap=0.0)


def signs(step: int = 0, **changes: object) -> StepSigns:
    values: dict[str, object] = {
        "step": step,
        "is_skipped": False,
        "is_loss_finite": True,
        "loss": 1.0 + 0.01 * (step % 3),
        "loss_scale": 65536.0,
        "progress": 0.1,
    }
    return StepSigns(**{**values, **changes})  # type: ignore[arg-type]


def prove(guard: Guard, current: Tier, tier: Tier, num: int = 3) -> None:
    for _ in range(num):
        guard.take_probe(current, {tier: GOOD})


def test_a_cheaper_tier_is_safe_after_three_good_probes_in_a_row() -> None:
    guard = Guard(LADDER)
    prove(guard, FP32, BF16, 2)
    assert not guard.is_safe(BF16)
    guard.take_probe(FP32, {BF16: FAIR})
    prove(guard, FP32, BF16, 2)
    assert not guard.is_safe(BF16)
    prove(guard, FP32, BF16, 1)
    assert guard.is_safe(BF16)


def test_the_candidate_is_the_dearest_cheaper_tier_that_is_really_faster() -> None:
    guard = Guard(LADDER)
    assert guard.candidate(FP32, COSTS) is BF16
    assert guard.candidate(FP32, {**COSTS, BF16: 1.2, FP16: 0.99}) is INT8
    assert guard.candidate(FP32, {FP32: 1.0}) is None, "nothing is assumed of a tier that was not measured"
    assert guard.candidate(FLOOR, COSTS) is None


@pytest.mark.parametrize(
    "probe",
    [
        BAD,
        Probe(noise_ratio=0.001, norm_ratio=0.7, loss_gap=0.0),
        Probe(noise_ratio=0.001, norm_ratio=1.3, loss_gap=0.0),
        Probe(noise_ratio=0.001, norm_ratio=1.0, loss_gap=0.06),
        Probe(noise_ratio=math.nan, norm_ratio=math.nan, loss_gap=math.nan),
        Probe(noise_ratio=math.inf, norm_ratio=1.0, loss_gap=0.0),
    ],
)
def test_a_bad_probe_of_the_present_tier_raises_it_and_bans_it_for_longer_each_time(probe: Probe) -> None:
    guard = Guard(LADDER)
    move = guard.take_probe(INT8, {INT8: probe})
    assert move is not None
    assert (move.tier, move.cause, move.is_rollback) == (FP16, Cause.PROBE, False)
    lengths = []
    for _ in range(3):
        began = guard.num_probes
        while guard.is_banned(INT8):
            guard.take_probe(FP16, {FP16: GOOD})
        lengths.append(guard.num_probes - began)
        guard.take_probe(INT8, {INT8: probe})
    assert lengths == [2, 4, 8]


def test_between_the_two_thresholds_nothing_moves() -> None:
    guard = Guard(LADDER)
    assert guard.take_probe(INT8, {INT8: FAIR}) is None
    assert not guard.is_safe(INT8)


def test_a_coarse_tier_must_be_better_than_a_fine_one() -> None:
    noisy = Probe(noise_ratio=0.06, norm_ratio=1.0, loss_gap=0.0)
    assert Guard(LADDER).take_probe(BF16, {BF16: noisy}) is None
    assert Guard(LADDER).take_probe(INT8, {INT8: noisy}) is not None
    guard = Guard(LADDER)
    for _ in range(3):
        guard.take_probe(FP32, {tier: Probe(noise_ratio=0.02, norm_ratio=1.0, loss_gap=0.0) for tier in (BF16, INT8)})
    assert (guard.is_safe(BF16), guard.is_safe(INT8)) == (True, False)


def test_a_bias_is_measured_against_what_is_to_be_learned_not_against_the_noise() -> None:
    def probe(bias: float) -> Probe:
        return Probe(noise_ratio=0.001, norm_ratio=1.0, loss_gap=0.0, bias_sq=bias, signal_sq=2.0)

    guard = Guard(LADDER)
    moves = [guard.take_probe(BF16, {BF16: probe(bias)}) for bias in (0.5, 0.5, 0.5)]
    assert moves[:2] == [None, None], "one or two probes say little of a bias"
    assert moves[2] is not None
    assert "bias power 0.25 of the gradient's" in moves[2].reason
    guard = Guard(LADDER)
    for bias in (0.5, -0.5, 0.1):  # what is no bias has both signs
        assert guard.take_probe(BF16, {BF16: probe(bias), FP16: probe(0.1)}) is None
    assert not guard.is_safe(FP16), "0.05 of the gradient: neither to be left nor to be entered"


def test_a_signal_lost_in_noise_says_nothing_of_a_bias() -> None:
    guard = Guard(LADDER)
    for _ in range(5):
        probe = Probe(noise_ratio=0.001, norm_ratio=1.0, loss_gap=0.0, bias_sq=1.0, signal_sq=-0.1)
        assert guard.take_probe(BF16, {BF16: probe, FP16: probe}) is None
    assert guard.is_safe(FP16)


def test_a_step_that_is_not_finite_raises_the_tier_at_once_and_a_second_one_goes_back() -> None:
    guard = Guard(LADDER)
    first = guard.take_step(INT8, signs(7, is_skipped=True, is_loss_finite=False))
    assert first is not None
    assert (first.tier, first.cause, first.is_rollback) == (FP16, Cause.NON_FINITE, False)
    prove(guard, FP16, INT8)
    second = guard.take_step(FP16, signs(9, is_skipped=True, is_loss_finite=False))
    assert second is not None
    assert (second.tier, second.is_rollback) == (FP32, True), "two tiers up"
    assert not guard.is_safe(BF16)
    assert guard.candidate(FP32, COSTS) is None, "no cheaper tier for ten probes"
    for _ in range(10):
        guard.take_probe(FP32, {})
    assert guard.candidate(FP32, COSTS) is not None or guard.is_banned(BF16)


def test_the_dearest_tier_has_nowhere_to_go() -> None:
    guard = Guard(LADDER)
    assert guard.take_step(FP32, signs(is_skipped=True, is_loss_finite=False)) is None
    assert guard.take_probe(FP32, {}) is None


def test_overflows_in_fp16_are_the_scales_affair_until_there_are_many() -> None:
    guard = Guard(LADDER)
    moves: list[Move | None] = [guard.take_step(FP16, signs(step, is_skipped=True)) for step in (3, 40, 77)]
    assert moves[:2] == [None, None]
    assert moves[2] is not None
    assert (moves[2].tier, moves[2].cause) == (BF16, Cause.OVERFLOWS)
    guard = Guard(LADDER)
    assert [guard.take_step(FP16, signs(step, is_skipped=True)) for step in (3, 140, 277)] == [None] * 3
    low = guard.take_step(FP16, signs(500, is_skipped=True, loss_scale=0.5))
    assert low is not None
    assert low.cause is Cause.OVERFLOWS


def test_a_loss_far_above_its_average_goes_back_and_two_tiers_up() -> None:
    guard = Guard(LADDER)
    for step in range(60):
        assert guard.take_step(INT8, signs(step)) is None
    move = guard.take_step(INT8, signs(60, loss=5.0))
    assert move is not None
    assert (move.tier, move.cause, move.is_rollback) == (BF16, Cause.SPIKE, True)


def test_losses_before_a_change_of_settings_say_nothing_about_those_after() -> None:
    guard = Guard(LADDER)
    for step in range(60):
        guard.take_step(INT8, signs(step))
    guard.forget_losses()
    assert guard.take_step(INT8, signs(60, loss=5.0)) is None


def test_a_spike_in_the_dearest_tier_is_not_precisions_fault() -> None:
    guard = Guard(LADDER)
    for step in range(60):
        guard.take_step(FP32, signs(step))
    assert guard.take_step(FP32, signs(60, loss=5.0)) is None


def test_the_last_tenth_runs_in_bf16_or_dearer() -> None:
    guard = Guard(LADDER)
    prove(guard, BF16, INT8)
    assert guard.take_step(INT8, signs(progress=0.89)) is None
    move = guard.take_step(INT8, signs(progress=0.9))
    assert move is not None
    assert (move.tier, move.cause) == (BF16, Cause.FINAL)
    assert not guard.is_safe(INT8)
    assert guard.candidate(BF16, COSTS) is None
    assert guard.take_step(BF16, signs(progress=0.95)) is None


def test_an_operand_that_is_lost_raises_the_tier_at_once() -> None:
    guard = Guard(LADDER)
    for lost in ({"saturated": 0.3}, {"vanished": 0.97}):
        move = guard.take_step(FLOOR, signs(4, **lost))
        assert move is not None
        assert (move.tier, move.cause, move.is_rollback) == (INT8, Cause.RANGE, False)
    assert guard.is_banned(FLOOR)
    assert guard.take_step(FP32, signs(5, vanished=0.97)) is None, "the dearest has nowhere to go"


def test_an_operand_of_which_much_is_lost_asks_for_a_probe_and_less_often_each_time() -> None:
    guard = Guard(LADDER)
    alarms = []
    for step in range(400):
        assert guard.take_step(FLOOR, signs(step, saturated=0.05)) is None
        if guard.alarm:
            alarms.append(step)
            guard.take_probe(FLOOR, {FLOOR: GOOD})
            assert not guard.alarm
    assert alarms == [0, 40, 120, 280]


@pytest.mark.parametrize(("factor", "is_alarm"), [(1.0, False), (1.3, False), (1.7, True), (0.5, True)])
def test_gradients_of_another_length_than_in_the_tier_before_ask_for_a_probe(factor: float, is_alarm: bool) -> None:
    guard = Guard(LADDER)
    for step in range(20):
        guard.take_step(BF16, signs(step, grad_norm=2.0))
    guard.forget_losses()
    for step in range(20, 40):
        guard.take_step(INT8, signs(step, grad_norm=2.0 * factor))
    assert bool(guard.alarm) is is_alarm
    guard = Guard(LADDER)
    for step in range(20):
        guard.take_step(BF16, signs(step, grad_norm=2.0))
    guard.forget_losses(is_same_batch=False)
    for step in range(20, 40):
        guard.take_step(INT8, signs(step, grad_norm=2.0 * factor))
    assert not guard.alarm, "with another batch lengths say nothing"


def test_bans_outlive_a_restart() -> None:
    guard = Guard(LADDER)
    guard.take_probe(INT8, {INT8: BAD})
    again = Guard(LADDER)
    again.restore(guard.state())
    assert again.is_banned(INT8)
    assert again.state() == guard.state()
    again.restore(None)
