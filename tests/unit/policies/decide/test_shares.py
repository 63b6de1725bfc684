from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.decide.shares import Claim, climb, components, fill, fits
from orchestrator.policies.plan import DeviceId, TrialId

D0, D1 = DeviceId("d0"), DeviceId("d1")


def claim(
    name: str, weight: float = 1.0, low: float = 0.01, high: float = 1.0, placement: tuple[DeviceId, ...] = (D0,)
) -> Claim:
    return Claim(trial_id=TrialId(name), weight=weight, min_share=low, max_share=high, placement=placement)


@st.composite
def crowds(draw: st.DrawFn) -> list[Claim]:
    """Claims whose minima fit."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    load: Counter[DeviceId] = Counter()
    claims = []
    for index in range(draw(st.integers(1, 12))):
        placement = tuple(DeviceId(f"d{rng.randrange(3)}") for _ in range(rng.choice((1, 1, 1, 2, 3))))
        low = rng.choice((0.01, 0.05, 0.2))
        if all(load[device_id] + low * placement.count(device_id) <= 1 for device_id in placement):
            for device_id in placement:
                load[device_id] += low  # type: ignore[assignment]
            high = rng.uniform(low, 1.0)
            claims.append(claim(f"t{index:02d}", rng.choice((0.3, 1.0, 2.0)), low, high, placement))
    return claims


def load_of(claims: list[Claim], shares: dict[TrialId, float]) -> dict[DeviceId, float]:
    load: dict[DeviceId, float] = {}
    for one in claims:
        for device_id in one.placement:
            load[device_id] = load.get(device_id, 0.0) + shares[one.trial_id]
    return load


def test_equals_get_equal_shares() -> None:
    shares = fill([claim("a"), claim("b"), claim("c")])
    assert set(shares.values()) == {0.333333}


def test_shares_follow_weights() -> None:
    assert fill([claim("a", weight=3.0), claim("b", weight=1.0)]) == {"a": 0.75, "b": 0.25}


def test_what_a_bounded_trial_leaves_goes_to_the_others() -> None:
    shares = fill([claim("a", high=0.1), claim("b"), claim("c", low=0.6)])
    assert shares == {"a": 0.1, "b": pytest.approx(0.3), "c": 0.6}


def test_a_trial_on_two_devices_is_held_back_by_the_fuller_one() -> None:
    shares = fill([claim("a", placement=(D0, D1)), claim("b"), claim("c"), claim("d", placement=(D1,))])
    assert shares[TrialId("a")] == pytest.approx(1 / 3, abs=1e-5)
    assert shares[TrialId("d")] == pytest.approx(2 / 3, abs=1e-5)


def test_two_ranks_on_one_device_count_twice() -> None:
    assert fill([claim("a", placement=(D0, D0))]) == {"a": 0.5}


def test_minima_that_do_not_fit_are_given_all_the_same() -> None:
    assert fill([claim("a", low=0.7), claim("b", low=0.7)]) == {"a": 0.7, "b": 0.7}


@given(crowds())
def test_filling_fits_respects_bounds_and_leaves_nothing_that_someone_could_use(claims: list[Claim]) -> None:
    shares = fill(claims)
    assert fits(claims, shares)
    load = load_of(claims, shares)
    for one in claims:
        share = shares[one.trial_id]
        assert one.min_share <= share <= one.max_share
        is_held_back = any(load[device_id] > 1 - 1e-4 for device_id in one.placement)
        assert is_held_back or share > one.max_share - 1e-5


@given(crowds())
def test_filling_is_max_min_fair(claims: list[Claim]) -> None:
    """Who is below its maximum shares a full device on which nobody has more for its weight, bounds apart."""
    shares = fill(claims)
    load = load_of(claims, shares)
    for one in claims:
        if shares[one.trial_id] > one.max_share - 1e-5:
            continue
        level = shares[one.trial_id] / one.weight
        full = [device_id for device_id in one.placement if load[device_id] > 1 - 1e-4]
        assert any(
            all(
                shares[other.trial_id] / other.weight <= level + 1e-4
                or shares[other.trial_id] <= other.min_share + 1e-5
                for other in claims
                if device_id in other.placement
            )
            for device_id in full
        )


@given(crowds(), st.sampled_from((0.3, 0.8, 1.0)))
def test_climbing_fits_keeps_the_floor_and_wastes_at_most_a_quantum(claims: list[Claim], exponent: float) -> None:
    floor = {one.trial_id: one.min_share for one in claims}
    shares = climb(claims, floor, lambda _, share: share**exponent, 1 / 64)
    assert fits(claims, shares)
    load = load_of(claims, shares)
    for one in claims:
        assert one.min_share <= shares[one.trial_id] <= one.max_share + 1e-12
        step = max(one.placement.count(device_id) for device_id in one.placement) / 64
        is_held_back = any(load[device_id] > 1 - step - 1e-6 for device_id in one.placement)
        assert is_held_back or shares[one.trial_id] > one.max_share - 1e-9


@given(st.lists(st.sampled_from((0.3, 0.5, 0.7, 0.9)), min_size=2, max_size=3))
def test_climbing_finds_the_best_division_of_one_device(exponents: list[float]) -> None:
    claims = [claim(f"t{index}", low=1 / 16) for index in range(len(exponents))]
    of = {one.trial_id: exponent for one, exponent in zip(claims, exponents, strict=True)}
    floor = {one.trial_id: 1 / 16 for one in claims}
    shares = climb(claims, floor, lambda trial_id, share: share ** of[trial_id], 1 / 16)
    found = sum(share ** of[trial_id] for trial_id, share in shares.items())
    assert found == pytest.approx(max(_value(parts, exponents) for parts in _divisions(16, len(exponents))))


def _divisions(total: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(1, total) for rest in _divisions(total - first, parts - 1)]


def _value(parts: tuple[int, ...], exponents: list[float]) -> float:
    return math.fsum((part / 16) ** exponent for part, exponent in zip(parts, exponents, strict=True))


def test_trials_without_a_common_device_are_divided_apart() -> None:
    d2, d3 = DeviceId("d2"), DeviceId("d3")
    claims = [
        claim("a", placement=(D0, D1)),
        claim("b", placement=(D1, d2)),
        claim("c", placement=(d3,)),
        claim("d", placement=(d2,)),
    ]
    groups = components(claims)
    assert [[one.trial_id for one in group] for group in groups] == [["a", "b", "d"], ["c"]]
