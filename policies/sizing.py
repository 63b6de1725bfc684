"""Which size for whom: choosing one option per trial so that the values sum to the most and the devices suffice.

Counts devices only; where they are is `policies.placing`. `best_counts` is exact for one type of device, `climb_sizes`
goes by marginal value per device and takes several types and quotas. A value may be anything that adds up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NONE = -1
"""The choice of a trial that gets nothing."""


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


def best_counts(menus: Sequence[Menu], capacity: int) -> list[int]:
    """The best option of each trial on devices of one type, by dynamic programming over their number.

    Time grows with trials times options times capacity. Ties go to fewer devices.

    >>> low, high = Menu((0, 0), (1, 2), (1.0, 1.5), 0.0), Menu((0, 0), (1, 2), (1.0, 1.9), 0.0)
    >>> best_counts([low, high], 3)
    [0, 1]
    """
    best = np.zeros(capacity + 1)
    choices: list[npt.NDArray[np.int16]] = []
    for menu in menus:
        top = best + menu.idle
        choice = np.full(capacity + 1, NONE, dtype=np.int16)
        for index, (devices, value) in enumerate(zip(menu.devices, menu.values, strict=True)):
            if devices > capacity or not value > -math.inf:
                continue
            other = best[: capacity + 1 - devices] + value
            better = other > top[devices:] + 1e-12
            np.copyto(top[devices:], other, where=better)
            np.copyto(choice[devices:], index, where=better)
        best = top
        choices.append(choice)
    left, picked = int(best.argmax()) if len(best) else 0, []
    for menu, choice in zip(reversed(menus), reversed(choices), strict=True):
        index = int(choice[left])
        picked.append(index)
        left -= menu.devices[index] if index != NONE else 0
    return picked[::-1]


def climb_sizes(
    menus: Sequence[Menu],
    capacities: Sequence[int],
    allows: Callable[[int, int], bool] | None = None,
    order: Sequence[int] | None = None,
) -> list[int]:
    """One option per trial, always taking the step that adds most value per device.

    Args:
        menus: what each trial may get.
        capacities: devices of each type.
        allows: whether trial i may be given that many devices more; called again for every step, and expected to
            charge it when it says yes.
        order: a rank per trial that breaks ties, the smaller first.
    """
    left = list(capacities)
    chosen = [NONE] * len(menus)
    ranks = order or range(len(menus))
    heap: list[tuple[float, int, int, int]] = []

    def offer(trial: int) -> None:
        step = _best_step(menus[trial], chosen[trial], left)
        if step is not None:
            heapq.heappush(heap, (-step[1], ranks[trial], trial, step[0]))

    for trial in range(len(menus)):
        offer(trial)
    while heap:
        _, _, trial, option = heapq.heappop(heap)
        menu, now = menus[trial], chosen[trial]
        kind, more = menu.kinds[option], menu.devices[option]
        freed = menu.devices[now] if now != NONE else 0
        same = now != NONE and menu.kinds[now] == kind
        if more - (freed if same else 0) > left[kind]:
            offer(trial)  # what was best does not fit any more; something smaller may
            continue
        if allows is not None and not allows(trial, more - freed):
            continue
        if now != NONE:
            left[menu.kinds[now]] += freed
        left[kind] -= more
        chosen[trial] = option
        offer(trial)
    return chosen


def _best_step(menu: Menu, now: int, left: Sequence[int]) -> tuple[int, float] | None:
    """(option, value per device) of the best step from an option that fits; None if no step is better."""
    have, worth = (menu.devices[now], menu.values[now]) if now != NONE else (0, menu.idle)
    here = menu.kinds[now] if now != NONE else NONE
    best: tuple[int, float] | None = None
    for option, (kind, devices, value) in enumerate(zip(menu.kinds, menu.devices, menu.values, strict=True)):
        if not value > worth or devices - (have if kind == here else 0) > left[kind]:
            continue
        more = devices - have
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
