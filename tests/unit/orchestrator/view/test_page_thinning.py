from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.view.page.thinning import bucket_maxima, bucket_means, plain, rounded, thinned


def test_a_short_curve_is_kept_whole() -> None:
    values = np.arange(5.0)
    assert thinned(values, values, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_peak_survives() -> None:
    x = np.arange(1000.0)
    y = np.where(x == 537, 10.0, 1.0)
    kept = thinned(x, y, 20)
    assert 537 in kept
    assert len(kept) == 20


@given(st.integers(0, 400), st.integers(3, 60), st.integers(0, 2**32 - 1))
def test_the_points_are_few_ordered_and_hold_both_ends(count: int, num_points: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=count)
    kept = thinned(np.arange(float(count)), y, num_points)
    assert len(kept) == min(count, num_points)
    assert np.all(np.diff(kept) > 0)
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)


def test_bucket_means_leave_out_what_is_not_known() -> None:
    means = bucket_means(np.array([0.5, 0.6, 2.5]), np.array([1.0, math.nan, 3.0]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert means[0] == 1
    assert math.isnan(means[1])
    assert means[2] == 3


def test_bucket_maxima_keep_the_largest() -> None:
    t_s, values = bucket_maxima(np.arange(6.0), np.array([1.0, math.nan, 5.0, 2.0, math.nan, 3.0]), 2)
    assert t_s.tolist() == [0, 3]
    assert values.tolist() == [5, 3]
    assert bucket_maxima(np.zeros(0), np.zeros(0), 3)[0].tolist() == []


@pytest.mark.parametrize(
    ("value", "expected"), [(math.nan, None), (math.inf, None), (3.0, 3), (0.123456789, 0.12346), (None, None)]
)
def test_numbers_are_short_and_finite(value: float | None, expected: float | None) -> None:
    assert rounded(value) == expected
    assert plain([value]) == (expected,)
