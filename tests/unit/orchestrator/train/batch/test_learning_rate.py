"""The learning rate: scaling rules, a warm-up that counts samples, and the ramp after a change of batch."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.train.batch.learning_rate import LearningRate, ScalingRule, Schedule, scaled

FLAT = Schedule(base_batch=16, rule=ScalingRule.SQRT, ramp_samples=1_000)
BASE = 0.1


def test_the_rules_are_the_published_ones() -> None:
    assert scaled(0.1, "sqrt", 16, 64) == pytest.approx(0.2)
    assert scaled(0.1, "linear", 16, 64) == pytest.approx(0.4)
    assert scaled(0.1, "none", 16, 64) == 0.1


def test_for_adam_the_rate_grows_up_to_the_noise_scale_and_not_beyond_it() -> None:
    assert scaled(0.1, "sqrt", 16, 64, noise_scale=1000.0) == pytest.approx(0.2)
    assert scaled(0.1, "sqrt", 16, 64, noise_scale=36.0) == pytest.approx(0.15)
    assert scaled(0.1, "sqrt", 16, 4096, noise_scale=36.0) == scaled(0.1, "sqrt", 16, 36, noise_scale=36.0)
    assert scaled(0.1, "sqrt", 16, 64, noise_scale=4.0) == 0.1, "both are beyond it"
    assert scaled(0.1, "sqrt", 16, 1, noise_scale=4.0) == pytest.approx(0.05)


def test_for_sgd_the_rate_grows_by_the_gain_of_the_larger_batch() -> None:
    assert scaled(0.1, "adascale", 16, 64) == pytest.approx(0.4)
    assert scaled(0.1, "adascale", 16, 64, noise_scale=1e9) == pytest.approx(0.4)
    assert scaled(0.1, "adascale", 16, 64, noise_scale=16.0) == pytest.approx(0.1 * 2 / 1.25)
    assert scaled(0.1, "adascale", 16, 64, noise_scale=0.0) == 0.1
    assert scaled(0.1, "adascale", 16, 16, noise_scale=7.0) == 0.1


def test_a_noise_scale_that_moves_takes_the_rate_along() -> None:
    schedule = dataclasses.replace(FLAT, rule=ScalingRule.ADASCALE)
    rate = LearningRate.start(schedule, 16).with_batch(64, 2_000, 16.0)
    assert rate.at(BASE, 2_000, 16.0) == 0.1
    assert rate.at(BASE, 3_000, 16.0) == pytest.approx(0.16)
    assert rate.at(BASE, 3_000, 48.0) == pytest.approx(0.1 * 4 / 1.75)
    assert rate.is_ramping(2_500, 48.0)
    assert not rate.is_ramping(3_000, 48.0)


def test_an_unknown_rule_is_refused_and_the_allowed_are_named() -> None:
    with pytest.raises(ValueError, match="allowed: none, sqrt, linear, adascale"):
        scaled(0.1, "cube", 16, 64)


@pytest.mark.parametrize(("base", "batch"), [(0, 1), (1, 0), (-4, 4)])
def test_a_batch_below_one_is_refused(base: int, batch: int) -> None:
    with pytest.raises(ValueError, match="allowed: both >= 1"):
        scaled(0.1, "sqrt", base, batch)


def test_warm_up_is_linear_in_samples_and_never_zero() -> None:
    schedule = dataclasses.replace(FLAT, warmup_samples=100)
    assert 0 < schedule.at(BASE, 0) <= schedule.at(BASE, 1)
    assert schedule.at(BASE, 50) == pytest.approx(0.05)
    assert schedule.at(BASE, 100) == 0.1


def test_a_larger_batch_brings_its_rate_in_over_the_ramp() -> None:
    rate = LearningRate.start(FLAT, 16).with_batch(64, 2_000)
    assert rate.at(BASE, 2_000) == pytest.approx(0.1)
    assert rate.at(BASE, 2_500) == pytest.approx(0.15)
    assert rate.is_ramping(2_999)
    assert rate.at(BASE, 3_000) == pytest.approx(0.2)
    assert not rate.is_ramping(3_000)


def test_a_smaller_batch_lowers_the_rate_at_once() -> None:
    rate = LearningRate.start(FLAT, 64).with_batch(16, 2_000)
    assert rate.at(BASE, 2_000) == pytest.approx(0.1)
    assert not rate.is_ramping(2_000)


def test_a_change_during_a_ramp_takes_its_place_from_where_it_was() -> None:
    rate = LearningRate.start(FLAT, 16).with_batch(64, 0)
    changed = rate.with_batch(144, 500)
    assert changed.at(BASE, 500) == pytest.approx(rate.at(BASE, 500)) == pytest.approx(0.15)
    assert changed.at(BASE, 1_500) == pytest.approx(0.3)


def test_the_same_batch_changes_nothing() -> None:
    rate = LearningRate.start(FLAT, 16)
    assert rate.with_batch(16, 500) is rate


def test_without_a_ramp_the_rate_changes_at_once() -> None:
    rate = LearningRate.start(dataclasses.replace(FLAT, ramp_samples=0), 16).with_batch(64, 7)
    assert rate.at(BASE, 7) == pytest.approx(0.2)


@given(
    batches=st.lists(st.integers(1, 512), min_size=1, max_size=6),
    gaps=st.lists(st.integers(0, 3_000), min_size=6, max_size=6),
    rule=st.sampled_from(list(ScalingRule)),
)
def test_the_rate_never_jumps_up_and_ends_where_the_last_batch_says(
    batches: list[int], gaps: list[int], rule: ScalingRule
) -> None:
    rate, samples = LearningRate.start(dataclasses.replace(FLAT, rule=rule), 16), 0
    for batch, gap in zip(batches, gaps, strict=False):
        samples += gap
        before = rate.at(BASE, samples)
        rate = rate.with_batch(batch, samples)
        assert rate.at(BASE, samples) <= before * (1 + 1e-12)
    assert rate.at(BASE, samples + FLAT.ramp_samples) == pytest.approx(scaled(0.1, rule, 16, rate.global_batch))


@given(batch=st.integers(1, 512), start=st.integers(0, 10**9), later=st.integers(0, 5_000))
def test_its_state_survives_json_exactly(batch: int, start: int, later: int) -> None:
    rate = LearningRate.start(FLAT, 16).with_batch(37, start // 2).with_batch(batch, start)
    again = LearningRate.restored(FLAT, json.loads(json.dumps(rate.state())))
    assert again == rate
    assert again.at(BASE, start + later) == rate.at(BASE, start + later)


@pytest.mark.parametrize(
    "change",
    [
        {"warmup_samples": -1},
        {"ramp_samples": -1},
        {"base_batch": 0},
    ],
)
def test_a_schedule_no_trial_can_follow_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        dataclasses.replace(FLAT, **change)
