from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ShareError
from orchestrator.share.packing import assign_units

SLACK = 1e-6


@st.composite
def shares_and_units(draw: st.DrawFn) -> tuple[list[tuple[str, float]], int]:
    """Shares that fit: some whole, some fractional, some zero."""
    units = draw(st.integers(1, 16))
    left = float(units)
    shares = []
    for number in range(draw(st.integers(0, 8))):
        amount = draw(st.one_of(st.integers(0, units).map(float), st.floats(0.05, units), st.just(0.5)))
        if amount <= left:
            shares.append((f"t{number}", amount / units))
            left -= amount
    return shares, units


@given(shares_and_units())
def test_every_key_gets_as_many_units_as_its_interval_can_touch(case: tuple[list[tuple[str, float]], int]) -> None:
    shares, units = case
    assigned = assign_units(shares, units)
    assert set(assigned) == {key for key, _ in shares}
    for key, share in shares:
        amount = share * units
        got = assigned[key]
        assert list(got) == sorted(set(got))
        assert all(0 <= unit < units for unit in got)
        if share == 0:
            assert got == ()
        else:
            assert math.ceil(amount - 1e-3) <= len(got) <= math.ceil(amount) + 1


@given(shares_and_units())
def test_whole_unit_shares_overlap_nothing(case: tuple[list[tuple[str, float]], int]) -> None:
    shares, units = case
    assigned = assign_units(shares, units)
    for key, share in shares:
        amount = share * units
        if amount >= 1 and abs(amount - round(amount)) < SLACK:
            assert len(assigned[key]) == round(amount)
            others = {unit for other, held in assigned.items() if other != key for unit in held}
            assert not others & set(assigned[key])


@given(shares_and_units())
def test_no_group_of_keys_is_squeezed_below_its_shares(case: tuple[list[tuple[str, float]], int]) -> None:
    """Hall's condition on intervals of units: the keys confined to them fit in."""
    shares, units = case
    assigned = assign_units(shares, units)
    amounts = {key: share * units for key, share in shares if share > 0}
    for low in range(units):
        for high in range(low, units):
            confined = [key for key in amounts if low <= min(assigned[key]) and max(assigned[key]) <= high]
            assert sum(amounts[key] for key in confined) <= high - low + 1 + 1e-2


@given(st.integers(1, 16), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8))
def test_a_device_granted_whole_is_covered_whole(units: int, weights: list[float]) -> None:
    total = sum(weights)
    assigned = assign_units([(str(i), weight / total) for i, weight in enumerate(weights)], units)
    assert {unit for held in assigned.values() for unit in held} == set(range(units))


@given(shares_and_units())
def test_an_assignment_passed_as_previous_comes_back(case: tuple[list[tuple[str, float]], int]) -> None:
    shares, units = case
    first = assign_units(shares, units)
    assert assign_units(shares, units, first) == first
    assert assign_units(list(reversed(shares)), units, first) == first


@given(shares_and_units(), st.data())
def test_a_whole_share_keeps_its_units_whoever_comes_or_goes(
    case: tuple[list[tuple[str, float]], int], data: st.DataObject
) -> None:
    shares, units = case
    first = assign_units(shares, units)
    stays = data.draw(st.lists(st.booleans(), min_size=len(shares), max_size=len(shares)))
    kept = [item for item, stay in zip(shares, stays, strict=True) if stay]
    free = 1.0 - sum(share for _, share in kept)
    after = assign_units([("new", max(0.0, free)), *kept], units, first)
    for key, share in kept:
        if share * units >= 1 and abs(share * units - round(share * units)) < SLACK:
            assert after[key] == first[key]


@given(shares_and_units(), st.data())
def test_whatever_was_before_the_units_suffice(case: tuple[list[tuple[str, float]], int], data: st.DataObject) -> None:
    shares, units = case
    anything = st.lists(st.integers(0, units), max_size=4).map(tuple)
    previous = {key: data.draw(anything) for key, _ in shares}
    assigned = assign_units(shares, units, previous)
    for key, share in shares:
        got = assigned[key]
        assert len(set(got)) == len(got)
        assert all(0 <= unit < units for unit in got)
        assert math.ceil(share * units - 1e-3) <= len(got) <= math.ceil(share * units) + 1


def test_halves_of_two_cores_are_cut_in_the_given_order() -> None:
    assert assign_units([("a", 0.25), ("b", 0.25), ("c", 0.5)], 2) == {"a": (1,), "b": (1,), "c": (0,)}
    assert assign_units([("a", 0.25), ("b", 0.75)], 2) == {"a": (0,), "b": (0, 1)}


def test_a_fractional_share_stays_when_its_neighbour_leaves() -> None:
    first = assign_units([("a", 0.25), ("b", 0.25), ("c", 0.25), ("d", 0.25)], 2)
    assert first == {"a": (0,), "b": (0,), "c": (1,), "d": (1,)}
    assert assign_units([("c", 0.25), ("d", 0.25)], 2, first) == {"c": (1,), "d": (1,)}


def test_a_new_whole_share_avoids_the_units_of_fractional_ones() -> None:
    assert assign_units([("new", 0.5), ("old", 0.25)], 2, {"old": (0,)}) == {"new": (1,), "old": (0,)}


def test_a_share_that_grows_keeps_the_units_it_had() -> None:
    assert assign_units([("a", 0.5)], 4, {"a": (2,)}) == {"a": (0, 2)}


def test_shares_that_were_rounded_on_their_way_are_still_whole() -> None:
    assert assign_units([("a", 0.333333), ("b", 0.333333), ("c", 0.333333)], 3) == {"a": (0,), "b": (1,), "c": (2,)}


@pytest.mark.parametrize(
    ("shares", "units", "what"),
    [
        ([("a", 0.6), ("b", 0.6)], 2, "add up"),
        ([("a", 0.5), ("a", 0.5)], 2, "twice"),
        ([("a", -0.1)], 2, "not a share"),
        ([("a", float("nan"))], 2, "not a share"),
        ([("a", 0.5)], 0, "units=0"),
    ],
)
def test_shares_that_cannot_be_placed_are_refused(shares: list[tuple[str, float]], units: int, what: str) -> None:
    with pytest.raises(ShareError, match=what):
        assign_units(shares, units)
