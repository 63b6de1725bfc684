from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.codec import dumps, fit_from, to_jsonable
from orchestrator.policies.learn.fit import (
    MAX_CELLS,
    NOTHING_FITTED,
    Observation,
    TrialFit,
    inherit,
    noise_scale,
    pool,
    predict_step_s,
    protect,
    update,
)
from orchestrator.policies.learn.noise import MAX_NOISE_SCALE
from orchestrator.policies.learn.speed import WINDOWS_PER_CELL, Prediction
from orchestrator.policies.tier import NAMED_TIERS, Tier
from tests.unit.policies.builders import measured, observation, settings


def predicted(
    fit: TrialFit, cores: float = 1.0, micro_batch: int = 8, grad_accum: int = 1, tier: Tier = Tier.FP32
) -> Prediction | None:
    return predict_step_s(fit, cores=cores, micro_batch=micro_batch, grad_accum=grad_accum, tier=tier, num_workers=1)


def step_s(fit: TrialFit, cores: float = 1.0, micro_batch: int = 8, grad_accum: int = 1) -> float:
    prediction = predicted(fit, cores, micro_batch, grad_accum)
    assert prediction is not None
    return prediction.step_s


OBSERVATIONS = st.builds(
    Observation,
    cores=st.floats(0.01, 64),
    tier=st.sampled_from(NAMED_TIERS),
    micro_batch=st.integers(1, 512),
    grad_accum=st.integers(1, 16),
    num_workers=st.integers(1, 4),
    num_steps=st.integers(1, 1000),
    step_s=st.floats(1e-6, 1e4),
    noise_trace=st.none() | st.floats(-1e6, 1e6),
    grad_sq=st.none() | st.floats(-1e6, 1e6),
    num_noise=st.integers(0, 50),
)


def test_nothing_is_known_before_the_first_observation() -> None:
    assert predicted(NOTHING_FITTED) is None
    assert noise_scale(NOTHING_FITTED) is None
    assert TrialFit() == NOTHING_FITTED


def test_one_window_is_not_enough_to_be_believed() -> None:
    assert predicted(measured(observation(0.1), windows=1)) is None
    assert predicted(measured(observation(0.1), windows=2)) is not None


def test_a_measured_setting_is_predicted_as_measured() -> None:
    prediction = predicted(measured(observation(0.1)))
    assert prediction is not None
    assert prediction.is_measured
    assert prediction.step_s == pytest.approx(0.1)


def test_an_unmeasured_tier_is_unknown_not_faster() -> None:
    assert predicted(measured(observation(0.1)), tier=Tier.BF16) is None


def test_another_number_of_workers_is_unknown() -> None:
    fit = measured(observation(0.1))
    assert predict_step_s(fit, cores=1, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=2) is None


def test_without_compute_there_is_no_step_time() -> None:
    assert predicted(measured(observation(0.1)), cores=0.0) is None


def test_half_a_core_takes_twice_as_long() -> None:
    fit = measured(observation(0.1, cores=1.0))
    assert step_s(fit, cores=0.5) == pytest.approx(0.2)
    assert step_s(measured(observation(0.2, cores=0.5)), cores=1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("exponent", [0.4, 0.6, 0.95])
def test_the_response_above_one_core_is_fitted(exponent: float) -> None:
    seen = [observation(0.1 / cores**exponent, cores=cores) for cores in (1.0, 2.0, 4.0, 8.0)]
    assert step_s(measured(*seen, windows=5), cores=16.0) == pytest.approx(0.1 / 16**exponent, rel=0.08)


def test_more_cores_may_be_slower_but_not_faster_than_their_number() -> None:
    slower = measured(observation(0.1, cores=1.0), observation(0.2, cores=8.0), windows=5)
    magic = measured(observation(0.1, cores=1.0), observation(0.001, cores=8.0), windows=5)
    assert step_s(slower, cores=4.0) < step_s(slower, cores=8.0)
    assert step_s(magic, cores=4.0) / step_s(magic, cores=8.0) == pytest.approx(2.0)


def test_floor_and_slope_are_solved_from_two_sizes() -> None:
    fit = measured(observation(0.02 + 0.004 * 8), observation(0.02 + 0.004 * 32, micro_batch=32))
    assert step_s(fit, micro_batch=128) == pytest.approx(0.02 + 0.004 * 128, rel=0.03)
    extrapolated = predicted(fit, micro_batch=128)
    assert extrapolated is not None
    assert not extrapolated.is_measured


def test_a_size_that_measures_faster_than_a_smaller_one_gives_no_negative_slope() -> None:
    fit = measured(observation(0.2, micro_batch=8), observation(0.1, micro_batch=16))
    assert step_s(fit, micro_batch=64) == pytest.approx(step_s(fit, micro_batch=128))


def test_time_that_grows_faster_than_the_size_gives_no_negative_floor() -> None:
    fit = measured(observation(0.1, micro_batch=8), observation(0.4, micro_batch=16))
    assert step_s(fit, micro_batch=1) > 0


def test_a_tier_measured_at_one_size_borrows_the_form_of_the_other() -> None:
    fp32 = [observation(0.001 + 0.1 * micro, micro_batch=micro) for micro in (8, 32)]
    fit = measured(*fp32, observation(0.4, tier=Tier.BF16))
    prediction = predicted(fit, micro_batch=32, tier=Tier.BF16)
    assert prediction is not None
    assert prediction.step_s == pytest.approx(1.6, rel=0.04)


def test_accumulation_multiplies_the_time_of_a_micro_batch() -> None:
    assert step_s(measured(observation(0.4, grad_accum=4)), grad_accum=2) == pytest.approx(0.2)


def test_two_windows_while_paused_or_contended_change_nothing() -> None:
    fit = measured(observation(0.1))
    disturbed = update(fit, [observation(10.0), observation(3.0)])
    assert step_s(disturbed) == pytest.approx(0.1)


def test_a_lasting_change_of_speed_is_followed() -> None:
    fit = update(measured(observation(0.1), windows=5), [observation(0.3)] * 3)
    assert step_s(fit) == pytest.approx(0.3)


def test_what_is_beside_a_trial_now_counts_once_it_was_seen_often_enough() -> None:
    alone, crowded = observation(0.1), dataclasses.replace(observation(0.2), crowd_share=0.5)
    fit = measured(alone, windows=WINDOWS_PER_CELL)
    assert 0.1 < step_s(update(fit, [crowded] * 2)) < 0.2
    fit = update(fit, [crowded] * WINDOWS_PER_CELL)
    assert step_s(fit) == pytest.approx(0.2)
    assert step_s(update(fit, [alone] * WINDOWS_PER_CELL)) == pytest.approx(0.1)


def test_scattered_windows_are_less_certain_than_steady_ones() -> None:
    steady = predicted(measured(observation(0.1)))
    scattered = predicted(update(NOTHING_FITTED, [observation(s) for s in (0.05, 0.1, 0.2)]))
    far = predicted(measured(observation(0.1)), micro_batch=64)
    assert steady is not None
    assert scattered is not None
    assert far is not None
    assert steady.rel_uncertainty < scattered.rel_uncertainty < far.rel_uncertainty


@pytest.mark.parametrize(
    "change",
    [
        {"step_s": math.nan},
        {"step_s": 0.0},
        {"step_s": math.inf},
        {"cores": -1.0},
        {"num_steps": 0},
        {"micro_batch": 0},
    ],
)
def test_an_impossible_observation_is_passed_over(change: dict[str, float]) -> None:
    fit = measured(observation(0.1))
    assert update(fit, [dataclasses.replace(observation(0.2), **change)]) == fit  # type: ignore[arg-type]


@given(st.lists(OBSERVATIONS, max_size=60))
def test_memory_is_bounded_and_predictions_are_finite(seen: list[Observation]) -> None:
    fit = update(NOTHING_FITTED, seen)
    assert len(fit.cells) <= MAX_CELLS
    assert all(len(cell.recent) <= WINDOWS_PER_CELL for cell in fit.cells)
    assert list(fit.cells) == sorted(fit.cells, key=lambda cell: cell.key)
    scale = noise_scale(fit)
    assert scale is None or 1.0 <= scale <= MAX_NOISE_SCALE
    for tier, micro_batch, cores in itertools.product(NAMED_TIERS, (1, 8, 1024), (0.1, 1.0, 30.0)):
        prediction = predicted(fit, cores, micro_batch, 1, tier)
        assert prediction is None or (0 < prediction.step_s < math.inf and prediction.rel_uncertainty >= 0)


@given(st.lists(OBSERVATIONS, max_size=20), st.integers(0, 20))
def test_taking_observations_in_two_parts_gives_the_same_bytes_as_at_once(seen: list[Observation], cut: int) -> None:
    at_once = update(NOTHING_FITTED, seen)
    assert dumps(update(update(NOTHING_FITTED, seen[:cut]), seen[cut:])) == dumps(at_once)
    assert fit_from(to_jsonable(at_once)) == at_once


@given(st.lists(st.lists(OBSERVATIONS, max_size=6), max_size=4))
def test_pooling_does_not_depend_on_the_order_of_trials(groups: list[list[Observation]]) -> None:
    fits = [update(NOTHING_FITTED, group) for group in groups]
    assert pool(fits).cells == pool(fits[::-1]).cells


def test_pooled_trials_know_each_others_tiers_and_drop_outliers() -> None:
    bf16 = measured(observation(0.05, tier=Tier.BF16))
    prediction = predicted(pool([measured(observation(0.1)), bf16]), tier=Tier.BF16)
    assert prediction is not None
    assert prediction.is_measured
    odd_one = pool([measured(observation(0.1)), measured(observation(0.1)), measured(observation(9.0))])
    assert step_s(odd_one) == pytest.approx(0.1)


def test_noise_needs_ten_estimates_and_averages_both_terms_apart() -> None:
    few = dataclasses.replace(observation(0.1, noise=(8.0, 0.5)), num_noise=9)
    assert noise_scale(update(NOTHING_FITTED, [few])) is None
    fit = update(NOTHING_FITTED, [observation(0.1, noise=(100.0, 1.0)), observation(0.1, noise=(300.0, 3.0))])
    assert noise_scale(fit) == pytest.approx(200.0 / 2.0, rel=0.02)


def test_noise_forgets_what_is_long_past() -> None:
    old = update(NOTHING_FITTED, [observation(0.1, noise=(10.0, 1.0))] * 50)
    new = update(old, [observation(0.1, noise=(500.0, 1.0))] * 50)
    scale = noise_scale(new)
    assert scale is not None
    assert scale > 450


@pytest.mark.parametrize(("noise", "expected"), [((-5.0, 1.0), 1.0), ((0.1, 1.0), 1.0)])
def test_a_variance_below_the_square_is_clamped(noise: tuple[float, float], expected: float) -> None:
    assert noise_scale(update(NOTHING_FITTED, [observation(0.1, noise=noise)])) == expected


def test_a_new_trial_inherits_speeds_but_neither_noise_nor_bans() -> None:
    fit = measured(observation(0.1, noise=(10.0, 1.0)))
    fit = protect(fit, settings(tier=Tier.BF16, micro_batch=8), settings(tier=Tier.FP32, micro_batch=4))
    child = inherit(fit)
    assert step_s(child) == pytest.approx(0.1)
    assert noise_scale(child) is None
    assert (child.banned_tiers, child.micro_batch_cap) == ((), None)


def test_an_override_bans_the_tier_it_fled_from_and_caps_the_micro_batch() -> None:
    fit = protect(NOTHING_FITTED, settings(tier=Tier.BF16, micro_batch=16), settings(tier=Tier.FP32, micro_batch=8))
    assert fit.banned_tiers == (Tier.BF16,)
    assert fit.micro_batch_cap == 8
    again = protect(fit, settings(micro_batch=64), settings(micro_batch=32))
    assert again == fit


def test_a_pause_by_override_bans_nothing() -> None:
    assert protect(NOTHING_FITTED, settings(share=0.5), settings(share=0.0)) == NOTHING_FITTED


def test_eager_windows_do_not_stand_for_the_speed_of_replayed_steps() -> None:
    eager = observation(0.1)
    fit = measured(eager)
    fit = update(fit, [dataclasses.replace(observation(0.02), is_replayed=True)] * 2)
    assert step_s(fit) == pytest.approx(0.02)
    assert [cell.is_replayed for cell in fit.cells] == [True]
    elsewhere = update(
        measured(observation(0.05, cores=4.0)), [dataclasses.replace(observation(0.02), is_replayed=True)] * 2
    )
    assert step_s(elsewhere) == pytest.approx(0.02), "the mode of a batch and tier is that of every share"
    alone = update(NOTHING_FITTED, [dataclasses.replace(observation(0.02), is_replayed=True)] * 2)
    assert step_s(elsewhere, cores=4.0) == step_s(alone, cores=4.0)


def test_of_trials_in_different_modes_the_faster_one_is_pooled_in_any_order() -> None:
    fits = [measured(observation(0.1)), measured(dataclasses.replace(observation(0.02), is_replayed=True))]
    assert step_s(pool(fits)) == pytest.approx(0.02)
    assert pool(fits) == pool(fits[::-1])


def test_a_fit_of_eager_steps_is_written_as_it_always_was() -> None:
    assert "is_replayed" not in dumps(measured(observation(0.1)))
    replayed = measured(dataclasses.replace(observation(0.02), is_replayed=True))
    assert fit_from(to_jsonable(replayed)) == replayed
