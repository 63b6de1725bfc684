"""SM groups: whole, disjoint, no more than the share rounded up, and never a swap between two trials."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ShareError
from orchestrator.share.grouping import assign_groups, count_groups

GROUPS = 15


@st.composite
def share_lists(draw: st.DrawFn) -> list[tuple[str, float]]:
    weights = draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=10))
    total = draw(st.floats(0.1, 1))
    return [(f"t{i}", total * weight / sum(weights)) for i, weight in enumerate(weights)]


@given(share_lists(), st.integers(1, 20))
def test_counts_follow_the_shares(shares: list[tuple[str, float]], num_groups: int) -> None:
    counts = count_groups(shares, num_groups)
    assert sum(counts.values()) <= num_groups
    for number, (key, share) in enumerate(shares):
        assert counts[key] <= max(1, math.ceil(share * num_groups + 1e-3))
        assert counts[key] >= (1 if number < num_groups else 0)


@given(st.lists(share_lists(), min_size=1, max_size=6))
def test_groups_are_disjoint_and_nobody_swaps(plans: list[list[tuple[str, float]]]) -> None:
    held: dict[str, tuple[int, ...]] = {}
    for shares in plans:
        assigned = assign_groups(shares, GROUPS, held)
        everything = [group for groups in assigned.values() for group in groups]
        others = [g for key, groups in held.items() if key not in assigned for g in groups]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= set(range(GROUPS)) - set(others)
        for key, groups in assigned.items():
            before = set(held.get(key, ()))
            assert set(groups) <= before or set(groups) >= before
        assert assign_groups(shares, GROUPS, {**held, **assigned}) == assigned, "what is, stays"
        held = assigned


@settings(max_examples=30)
@given(share_lists())
def test_a_whole_device_is_given_away_whole(shares: list[tuple[str, float]]) -> None:
    total = sum(share for _, share in shares)
    full = [(key, share / total) for key, share in shares]
    assert sum(len(groups) for groups in assign_groups(full, GROUPS).values()) == GROUPS


def test_more_trials_than_groups_leave_the_last_without() -> None:
    assert count_groups([(str(i), 0.25) for i in range(4)], 3) == {"0": 1, "1": 1, "2": 1, "3": 0}


def test_eight_of_fifteen_then_twelve_and_four() -> None:
    first = assign_groups([("a", 8 / 15), ("b", 7 / 15)], GROUPS)
    assert (first["a"], first["b"]) == (tuple(range(8)), tuple(range(8, 15)))
    second = assign_groups([("a", 12 / 15), ("b", 3 / 15)], GROUPS, first)
    assert second == {"a": (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14), "b": (8, 9, 10)}
    third = assign_groups([("a", 4 / 15), ("b", 11 / 15)], GROUPS, second)
    assert third == {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)}


@pytest.mark.parametrize(
    ("shares", "num_groups", "words"),
    [
        ([("a", 0.5)], 0, "0 SM groups"),
        ([("a", 0.5), ("a", 0.2)], 15, "comes twice"),
        ([("a", 0.8), ("b", 0.4)], 15, "do not fit one GPU"),
        ([("a", -0.1)], 15, "do not fit one GPU"),
    ],
)
def test_what_does_not_fit_is_refused(shares: list[tuple[str, float]], num_groups: int, words: str) -> None:
    with pytest.raises(ShareError, match=words):
        assign_groups(shares, num_groups)
