"""Choosing sizes: exact where it says so, and never more than the devices and the pools hold."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.decide.sizing import NONE, Menu, Pool, best_counts, climb_sizes, total

VALUES = st.floats(min_value=-5, max_value=50, allow_nan=False)


@st.composite
def problems(draw: st.DrawFn, num_kinds: int = 1) -> tuple[list[Menu], list[int], list[Pool]]:
    """Up to five trials with up to three options each, some of them in pools."""
    menus = []
    for _ in range(draw(st.integers(0, 5))):
        devices = tuple(sorted(draw(st.sets(st.integers(1, 6), max_size=3))))
        kinds = tuple(draw(st.integers(0, num_kinds - 1)) for _ in devices)
        menus.append(Menu(kinds, devices, tuple(draw(VALUES) for _ in devices), draw(st.sampled_from((0.0, -1.0)))))
    capacities = [draw(st.integers(0, 9)) for _ in range(num_kinds)]
    owners = [draw(st.integers(0, 2)) for _ in menus]
    pools = [
        Pool(members, draw(st.integers(0, 8)))
        for owner in (1, 2)
        if (members := tuple(i for i, each in enumerate(owners) if each == owner))
    ]
    return menus, capacities, pools


def fits(menus: list[Menu], chosen: list[int], capacities: list[int], pools: list[Pool]) -> bool:
    taken = [0 if c == NONE else menu.devices[c] for menu, c in zip(menus, chosen, strict=True)]
    used = [0] * len(capacities)
    for menu, choice, count in zip(menus, chosen, taken, strict=True):
        if choice != NONE:
            used[menu.kinds[choice]] += count
    within = all(sum(taken[i] for i in pool.members) <= pool.most for pool in pools)
    return within and all(count <= capacity for count, capacity in zip(used, capacities, strict=True))


def by_trying_all(menus: list[Menu], capacities: list[int], pools: list[Pool]) -> float:
    choices = [range(NONE, len(menu.devices)) for menu in menus]
    legal = (list(each) for each in itertools.product(*choices) if fits(menus, list(each), capacities, pools))
    return max(total(menus, each) for each in legal)


@given(problem=problems())
def test_best_counts_is_as_good_as_trying_all(problem: tuple[list[Menu], list[int], list[Pool]]) -> None:
    menus, capacities, pools = problem
    chosen = best_counts(menus, capacities[0], pools)
    assert fits(menus, chosen, capacities, pools)
    assert total(menus, chosen) == pytest.approx(by_trying_all(menus, capacities, pools), abs=1e-9)


@given(problem=problems(num_kinds=2))
def test_climb_sizes_keeps_devices_and_pools_and_is_never_worse_than_nothing(
    problem: tuple[list[Menu], list[int], list[Pool]],
) -> None:
    menus, capacities, pools = problem
    chosen = climb_sizes(menus, capacities, pools)
    assert fits(menus, chosen, capacities, pools)
    assert total(menus, chosen) >= sum(menu.idle for menu in menus)


def test_ties_go_to_fewer_devices() -> None:
    assert best_counts([Menu((0, 0), (1, 4), (2.0, 2.0), 0.0)], 4) == [0]


def test_who_has_to_run_runs_before_anybody_whose_value_is_larger() -> None:
    pinned = Menu((0, 0), (1, 2), (-math.inf, 0.1), -math.inf)
    large = Menu((0, 0), (1, 2), (50.0, 90.0), 0.0)
    assert best_counts([pinned, large], 3) == [1, 0]
    assert climb_sizes([pinned, large], [3]) == [1, 0]


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_full_pool_leaves_the_devices_to_the_others(is_exact: bool) -> None:
    menus, pools = [Menu((0, 0, 0), (1, 2, 3), (1.0, 1.9, 2.7), 0.0)] * 3, [Pool((0, 1), 2)]
    chosen = best_counts(menus, 6, pools) if is_exact else climb_sizes(menus, [6], pools)
    taken = [0 if choice == NONE else menus[0].devices[choice] for choice in chosen]
    assert taken[0] + taken[1] == 2
    assert taken[2] == 3


def test_a_step_that_its_pool_does_not_hold_is_replaced_by_a_smaller_one() -> None:
    steep = Menu((0, 0), (1, 4), (1.0, 8.0), 0.0)  # the first step offered is to four
    assert climb_sizes([steep], [4], [Pool((0,), 2)]) == [0]


def test_an_empty_pool_is_not_an_error() -> None:
    assert best_counts([Menu((0,), (1,), (1.0,), 0.0)], 1, [Pool((), 0)]) == [0]
    assert best_counts([], 4) == []
