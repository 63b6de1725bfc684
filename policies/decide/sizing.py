"""Which size for whom: choosing one option per trial so that the values sum to the most and the devices suffice.

Counts devices only; where they are is `policies.decide.placing`. `best_counts` is exact for one type of device,
`climb_sizes` goes by marginal value per device and takes several types. Both keep what trials of one user may hold
together. A value may be anything that adds up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NONE = -1
"""The choice of a trial that gets nothing."""
_TIE = 1e-12

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Menu:
    """What one trial may get.

    Attributes:
        kinds: index of the device type of each option.
        devices: devices that each option takes, in units of the caller's choice (all > 0).
        values: what each is worth.
        idle: what it is worth to get nothing; -inf where that is not allowed.
    """

    kinds: tuple[int, ...]
    devices: tuple[int, ...]
    values: tuple[float, ...]
    idle: float


@dataclass(frozen=True, slots=True)
class Pool:
    """Trials that may hold so many devices together, as those of a user with a quota; a trial is in one pool at most.

    Attributes:
        members: their positions among the menus.
        most: devices, in the unit of the menus.
    """

    members: tuple[int, ...]
    most: int


def best_counts(menus: Sequence[Menu], capacity: int, pools: Sequence[Pool] = ()) -> list[int]:
    """The best option of each trial on devices of one type, by dynamic programming over their number.

    Every pool is solved for any number of devices up to its own most, and those curves are options like any other.
    Time grows with trials times options times capacity. Ties go to fewer devices.

    >>> low, high = Menu((0, 0), (1, 2), (1.0, 1.5), 0.0), Menu((0, 0), (1, 2), (1.0, 1.9), 0.0)
    >>> best_counts([low, high], 3), best_counts([low, high], 3, [Pool((1,), 1)])
    ([0, 1], [1, 0])
    """
    pooled = {member for pool in pools for member in pool.members}
    tables = [_Table([menus[i] for i in pool.members], min(pool.most, capacity)) for pool in pools]
    free = [position for position in range(len(menus)) if position not in pooled]
    every = _Table([*(_as_menu(table.curve) for table in tables), *(menus[i] for i in free)], capacity)
    picked = every.pick(int(every.curve.argmax()))
    chosen = [NONE] * len(menus)
    for pool, table, option in zip(pools, tables, picked[: len(pools)], strict=True):
        for position, choice in zip(pool.members, table.pick(option + 1), strict=True):
            chosen[position] = choice
    for position, choice in zip(free, picked[len(pools) :], strict=True):
        chosen[position] = choice
    return chosen


def _as_menu(curve: Floats) -> Menu:
    """What a pool makes of every number of devices; none at all is its idle value, so option i is i + 1 devices."""
    return Menu((0,) * (len(curve) - 1), tuple(range(1, len(curve))), tuple(curve[1:].tolist()), float(curve[0]))


class _Table:
    """The best sum of values for every number of devices, after each menu in turn.

    Attributes:
        curve: of all menus; entry c is the best with at most c devices.
    """

    def __init__(self, menus: Sequence[Menu], capacity: int) -> None:
        self._menus = menus
        self._curves = np.zeros((len(menus) + 1, capacity + 1))
        # Row r of `shifted` is the last curve moved up by `capacity - r`, nothing coming in from below.
        padded = np.full(2 * capacity + 1, -math.inf)
        shifted = np.ndarray((capacity + 1, capacity + 1), dtype=np.float64, buffer=padded.data, strides=(8, 8))
        for number, menu in enumerate(menus):
            padded[capacity:] = self._curves[number]
            options = [
                (capacity - devices, value)
                for devices, value in zip(menu.devices, menu.values, strict=True)
                if devices <= capacity and value > -math.inf
            ]
            rows = [capacity, *(row for row, _ in options)]
            values = np.array([menu.idle, *(value for _, value in options)])
            sums = shifted[rows]
            sums += values[:, None]
            sums.max(axis=0, out=self._curves[number + 1])
        self.curve: Floats = self._curves[-1]

    def pick(self, devices: int) -> list[int]:
        """The option of every menu that reaches the best sum with at most so many devices."""
        left, picked = devices, []
        for number in range(len(self._menus) - 1, -1, -1):
            menu, before = self._menus[number], self._curves[number]
            best, choice = menu.idle + float(before[left]), NONE
            for index, (taken, value) in enumerate(zip(menu.devices, menu.values, strict=True)):
                if taken <= left and (found := value + float(before[left - taken])) > best + _TIE:
                    best, choice = found, index
            picked.append(choice)
            left -= menu.devices[choice] if choice != NONE else 0
        return picked[::-1]


def climb_sizes(menus: Sequence[Menu], capacities: Sequence[int], pools: Sequence[Pool] = ()) -> list[int]:
    """One option per trial, always taking the step that adds most value per device.

    Args:
        menus: what each trial may get.
        capacities: devices of each type.
        pools: what some of the trials may hold together.
    """
    left = list(capacities)
    pool_of = {member: number for number, pool in enumerate(pools) for member in pool.members}
    rooms = [float(pool.most) for pool in pools]
    chosen = [NONE] * len(menus)
    heap: list[tuple[float, int, int]] = []

    def offer(trial: int) -> None:
        room = rooms[pool_of[trial]] if trial in pool_of else math.inf
        step = _best_step(menus[trial], chosen[trial], left, room)
        if step is not None:
            heapq.heappush(heap, (-step[1], trial, step[0]))

    for trial in range(len(menus)):
        offer(trial)
    while heap:
        _, trial, option = heapq.heappop(heap)
        menu, now = menus[trial], chosen[trial]
        kind, more = menu.kinds[option], menu.devices[option]
        freed = menu.devices[now] if now != NONE else 0
        same = now != NONE and menu.kinds[now] == kind
        room = rooms[pool_of[trial]] if trial in pool_of else math.inf
        if more - (freed if same else 0) > left[kind] or more - freed > room:
            offer(trial)  # what was best does not fit any more; something smaller may
            continue
        if now != NONE:
            left[menu.kinds[now]] += freed
        left[kind] -= more
        if trial in pool_of:
            rooms[pool_of[trial]] -= more - freed
        chosen[trial] = option
        offer(trial)
    return chosen


def _best_step(menu: Menu, now: int, left: Sequence[int], room: float) -> tuple[int, float] | None:
    """(option, value per device) of the best step from an option that fits; None if no step is better."""
    have, worth = (menu.devices[now], menu.values[now]) if now != NONE else (0, menu.idle)
    here = menu.kinds[now] if now != NONE else NONE
    best: tuple[int, float] | None = None
    for option, (kind, devices, value) in enumerate(zip(menu.kinds, menu.devices, menu.values, strict=True)):
        more = devices - have
        if not value > worth or more > room or devices - (have if kind == here else 0) > left[kind]:
            continue
        gained = value - worth
        if not math.isfinite(gained):
            gained = 1e30 + value
        rate = gained / more if more > 0 else 1e15 * gained
        if best is None or rate > best[1] * (1 + 1e-12):
            best = (option, rate)
    return best


def total(menus: Sequence[Menu], chosen: Sequence[int]) -> float:
    """The sum of values."""
    return math.fsum(
        menu.idle if index == NONE else menu.values[index] for menu, index in zip(menus, chosen, strict=True)
    )
