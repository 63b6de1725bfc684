from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.learn.survival import LEAST, MOST, chance, chance_after_rung, place, rungs

LOSSES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.inf)), min_size=1, max_size=40).map(sorted)


@given(LOSSES, st.integers(2, 100))
def test_the_chance_is_a_probability_and_never_grows_with_the_loss(losses: list[float], factor: int) -> None:
    for chances in (
        [chance_after_rung(losses, loss, factor) for loss in losses],
        [chance(place(losses, loss), 1 / factor) for loss in losses],
    ):
        assert all(LEAST <= each <= MOST for each in chances)
        assert chances == sorted(chances, reverse=True)
    assert chance(place(losses, losses[0]), 1 / factor) > 0.5


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_more_go_on_the_better_the_chance(behind: float, few: float, many: float) -> None:
    few, many = sorted((few, many))
    assert chance(behind, few) <= chance(behind, many)


def test_at_the_edge_the_chance_is_even_and_among_none_a_trial_is_the_best() -> None:
    assert chance(0.25, 0.25) == 0.5
    assert place([], 1.0) == 0.0
    assert chance_after_rung([1.0, 2.0, 3.0, 4.0], 1.0, 4) == pytest.approx(1 / (1 + math.exp(-0.25 / 0.15)))


def test_rungs_end_before_the_last_report() -> None:
    assert rungs(1, 4, 16) == (1, 4)
    assert rungs(2, 3, 100) == (2, 6, 18, 54)
    assert rungs(5, 2, 5) == ()
