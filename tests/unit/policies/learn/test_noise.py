"""The noise scale from few and scattered estimates, and how far it is believed."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.learn.noise import MAX_NOISE_SCALE, NoiseTerms, above_zero, noise_ratio

NOTHING = NoiseTerms(noise_trace=0.0, grad_sq=0.0, num_estimates=0, scatter=0.0, num_windows=0)


def seen(true_square: float, deviation: float, windows: int, seed: int, per_window: int = 3) -> NoiseTerms:
    """Windows of estimates that scatter so much around the truth; the trace is 100 and hardly scatters."""
    rng = random.Random(seed)
    terms = NOTHING
    for _ in range(windows):
        squares = [rng.gauss(true_square, deviation) for _ in range(per_window)]
        terms = terms.add(rng.gauss(100.0, 5.0), statistics.fmean(squares), per_window)
    return terms


def test_many_estimates_say_what_they_say() -> None:
    scales = [seen(1.0, 1.0, 40, seed).scale for seed in range(40)]
    assert statistics.median(scales) == pytest.approx(100.0, rel=0.1)


def test_the_doubt_is_the_scatter_of_the_mean() -> None:
    means = [seen(1.0, 2.0, 12, seed) for seed in range(300)]
    doubts = [terms.doubt for terms in means]
    assert statistics.fmean(doubts) == pytest.approx(statistics.stdev(t.grad_sq for t in means), rel=0.2)


def test_estimates_that_cannot_be_told_from_zero_promise_no_more_than_they_rule_out() -> None:
    """The truth is 100; the plain ratio of few scattered terms is the cap in many cases."""
    terms = [seen(1.0, 4.0, 4, seed) for seed in range(200)]
    plain = [noise_ratio(each.noise_trace, each.grad_sq) for each in terms]
    assert sum(value == MAX_NOISE_SCALE for value in plain) > 20
    scales = [each.scale for each in terms]
    assert max(scales) < 2_000
    assert 30 < statistics.median(scales) < 200


def test_the_bounds_enclose_the_scale_and_close_in_on_it() -> None:
    few, many = seen(1.0, 2.0, 5, 1), seen(1.0, 2.0, 60, 1)
    for terms in (few, many):
        low, high = terms.bounds
        assert low < terms.scale < high
    assert many.bounds[1] / many.bounds[0] < few.bounds[1] / few.bounds[0]


def test_one_window_is_believed_with_a_doubt_of_its_own_size() -> None:
    terms = NOTHING.add(100.0, 1.0, 16)
    assert terms.doubt == pytest.approx(0.25)


def test_what_never_scattered_is_taken_as_it_is() -> None:
    terms = NoiseTerms(noise_trace=100.0, grad_sq=2.0, num_estimates=50, scatter=0.0, num_windows=0)
    assert terms.scale == 50.0
    assert terms.bounds == (50.0, 50.0)


@given(st.floats(-1e6, 1e6), st.just(0.0) | st.floats(1e-3, 1e6))
def test_what_lies_above_zero_is_positive_and_finite(mean: float, deviation: float) -> None:
    found, spread = above_zero(mean, deviation)
    assert math.isfinite(found)
    assert 0 <= spread <= deviation * (1 + 1e-9)
    assert found >= mean
    assert deviation == 0 or found > 0
