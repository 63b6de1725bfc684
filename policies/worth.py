"""What every size is worth to every movable trial under an objective: the values that `goodput_joint` chooses by.

A value is the trial's weight times what the objective makes of its speed-up over one whole device. A restart takes off
the part of the time in which it has to pay off. Where somebody has waited for long although there are devices enough
for everyone's least, getting nothing costs more than anything can gain. Knows no placement; chooses nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.policies.fleet import Fleet
from orchestrator.policies.movable import Budget, Mover
from orchestrator.policies.placing import size_now
from orchestrator.policies.prospects import Prospect, Size, reference
from orchestrator.policies.sizing import NONE, Menu, Pool
from orchestrator.policies.snapshot import Snapshot, TrialView

OBJECTIVES = ("throughput", "fair", "search", "deadline")
_PARTS = 8
"""Devices are counted in so many parts where a trial may have a fraction of one."""
_FAIR_FLOOR = 0.02
_EVEN_CHANCE = 0.25
"""Chance to survive its next rung at which a trial counts half. The weight saturates: all trials have to be judged
before a search ends, and a leader alone on a device leaves most of what several would make of it."""
_HOPELESS = 0.3
"""Least weight in a search: whoever has no chance waits as long as others make nearly as much of the device, not
longer, since it too has to reach its rung before the search can end."""
_LONG_WAIT_S = 180.0
"""Seconds without a device after which a trial gets its least from those who have more than theirs, whatever a restart
costs them."""
_LEAST_PAID = 0.05
"""Least part of its worth that a restart leaves."""
_SHORT_S = 100.0
"""Seconds alone on one device below which trials of unknown length count alike."""
_SERVICE_POWER = 0.7
"""How much less of `short_first` there is where the time to go is only expected."""
_DIMINISHING = 0.5
"""Exponent of speed-ups where lengths are unknown. A sum of plain speed-ups goes to whoever scales best, and that is
the longest trials; weights that know the lengths set that right, weights that only expect them do not."""


@dataclass(frozen=True)
class Scene:
    """What one decision is made from, and how devices are counted in it."""

    snapshot: Snapshot
    movers: Sequence[Mover]
    outlooks: Sequence[Prospect]
    fleet: Fleet

    def pairs(self) -> Iterator[tuple[Mover, Prospect]]:
        """Every trial with its prospect."""
        return zip(self.movers, self.outlooks, strict=True)

    @cached_property
    def knows_lengths(self) -> bool:
        """Whether the length of every trial is known."""
        return all(mover.trial.target_samples is not None for mover in self.movers)

    @cached_property
    def unit(self) -> int:
        """Units of a device: one where everybody has whole devices."""
        has_parts = any(mover.share % 1 for mover in self.movers)
        every = {id(outlook.sizes): outlook.sizes for outlook in self.outlooks}.values()  # trials alike share theirs
        return _PARTS if has_parts or any(size.share < 1 for sizes in every for size in sizes) else 1

    def units(self, devices: float) -> int:
        """Devices in these units."""
        return max(1, round(devices * self.unit))

    def counted(self, sizes: tuple[Size, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Type and units of each size."""
        found = self._counted.get(id(sizes))
        if found is None:
            found = tuple(size.kind for size in sizes), tuple(self.units(size.devices) for size in sizes)
            self._counted[id(sizes)] = found
        return found

    @cached_property
    def _counted(self) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        return {}

    @cached_property
    def pools(self) -> list[Pool]:
        """The trials of each user with a quota, and what is left of it; never less than what has to stay."""
        budget, found = Budget(self.snapshot), []
        for quota in self.snapshot.quotas:
            members = tuple(i for i, mover in enumerate(self.movers) if mover.trial.user == quota.user)
            pinned = [self.movers[i] for i in members if self.movers[i].is_pinned]
            held = sum(self.units(mover.share * len(mover.seats)) for mover in pinned)
            most = min(budget.left(quota.user), float(len(self.snapshot.devices))) * self.unit
            if members:
                found.append(Pool(members, max(held, math.floor(most + 1e-9), 0)))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is to be gained, and over which time a restart has to pay off.

    Attributes:
        name: one of `OBJECTIVES`.
        short_first: exponent of the weight that trials with less time to go get; 0 for none.
        horizon_s: seconds over which a restart has to pay off at least.
    """

    name: str
    short_first: float
    horizon_s: float

    def urgency(self, trial: TrialView) -> float:
        """What the objective makes of a trial apart from its speed."""
        if self.name == "search" and trial.survival is not None and trial.loss is not None:
            return max(_HOPELESS, trial.survival / (trial.survival + _EVEN_CHANCE))
        return 1.0

    def menus(self, scene: Scene) -> list[Menu]:
        """What every trial may get, with what each size is worth, in order."""
        fair = len(scene.fleet.devices) / len(scene.movers)
        weights = self._weights(scene)
        return [
            self._menu(mover, outlook, scene, (weight, fair))
            for (mover, outlook), weight in zip(scene.pairs(), weights, strict=True)
        ]

    def urged(self, scene: Scene, menus: Sequence[Menu]) -> tuple[list[Menu], frozenset[int]]:
        """The menus by which everybody is served who has waited for too long, and whom they must serve.

        For those, and for all that run so that nobody is sent away, getting nothing costs more than all other choices
        together can be worth. Nobody has to be served where nobody has waited for long.
        """
        overdue = self._overdue(scene, menus)
        if not overdue:
            return list(menus), frozenset()
        loss = math.fsum(_spread(menu) for menu in menus) + 1.0
        served = frozenset(i for i, mover in enumerate(scene.movers) if mover.seats or i in overdue)
        return [replace(menu, idle=menu.idle - loss) if i in served else menu for i, menu in enumerate(menus)], served

    def _overdue(self, scene: Scene, menus: Sequence[Menu]) -> set[int]:
        """Who has waited for too long and has to be served, the longest first, as far as the least of all fits.

        Nobody waits for long behind one that has more than its least and no less time to go. Behind shorter trials the
        long ones wait on purpose, and in a search those with little chance.
        """
        seconds = [_seconds_left(mover, outlook) for mover, outlook in scene.pairs()]
        least = [_least(menu) for menu in menus]
        held = [scene.units(mover.share * len(mover.seats)) if mover.seats else 0 for mover in scene.movers]
        can_give = (i for i, mover in enumerate(scene.movers) if held[i] > least[i] and not mover.is_pinned)
        longest_s = max((seconds[i] for i in can_give), default=-math.inf)
        waiting = [
            i
            for i, mover in enumerate(scene.movers)
            if not mover.seats and mover.in_force is not None and mover.age_s >= _LONG_WAIT_S
            if seconds[i] <= longest_s and self.urgency(mover.trial) == 1
        ]
        if not waiting:
            return set()
        rooms = {pool.members: float(pool.most) for pool in scene.pools}
        rooms[()] = float(len(scene.fleet.devices) * scene.unit)
        mine = {i: [(), *(pool.members for pool in scene.pools if i in pool.members)] for i in range(len(menus))}
        for i, mover in enumerate(scene.movers):
            for key in mine[i] if mover.seats else ():
                rooms[key] -= held[i] if mover.is_pinned else least[i]
        overdue: set[int] = set()
        for i in sorted(waiting, key=lambda i: (-scene.movers[i].age_s, scene.movers[i].trial_id)):
            if all(least[i] <= rooms[key] for key in mine[i]):
                overdue.add(i)
                for key in mine[i]:
                    rooms[key] -= least[i]
        return overdue

    def _weights(self, scene: Scene) -> list[float]:
        """Weight, urgency and priority of every trial, and under `throughput` how soon it is likely to end."""
        weights = [
            mover.trial.weight * self.urgency(mover.trial) * 1000.0 ** min(2, max(0, mover.trial.priority))
            for mover in scene.movers
        ]
        if self.name != "throughput":
            return weights
        seconds = [_seconds_left(mover, outlook) for mover, outlook in scene.pairs()]
        if scene.knows_lengths:
            ordered = sorted(seconds)
            soon = [_not_shorter(own_s, ordered) ** self.short_first for own_s in seconds]
        else:
            power = _SERVICE_POWER * self.short_first
            soon = [(_SHORT_S / (_SHORT_S + own_s)) ** power for own_s in seconds]
        return [weight * factor for weight, factor in zip(weights, soon, strict=True)]

    def _menu(self, mover: Mover, outlook: Prospect, scene: Scene, terms: tuple[float, float]) -> Menu:
        weight, fair = terms
        base, now, sizes = reference(outlook), size_now(mover, scene.fleet), outlook.sizes
        at = sizes.index(now) if now is not None and now in sizes else NONE
        rates = [inside or across for inside, across in zip(outlook.inside, outlook.across, strict=True)]
        if at != NONE and scene.fleet.num_nodes(mover.seats) > 1:
            rates[at] = outlook.across[at]
        values = []
        for index, rate in enumerate(rates):
            paid = rate * self._paid(mover, outlook, rate) if mover.seats and index != at and rate > 0 else rate
            value = weight * self._worth(mover.trial, paid, (base, fair, scene, outlook.is_prior))
            is_open = rate > 0 if not mover.is_pinned else index == at
            values.append(value if is_open else -math.inf)
        idle = -math.inf if mover.is_pinned and at != NONE else 0.0
        if self.name == "fair" and idle == 0:
            idle = -weight / _FAIR_FLOOR**2
        kinds, units = scene.counted(sizes)
        return Menu(kinds, units, tuple(values), idle)

    def _paid(self, mover: Mover, outlook: Prospect, rate: float) -> float:
        """Part of its time that a restart leaves a trial until it ends, or until it is likely to be changed again.

        It is expected to keep the next size for as long as it kept this one.
        """
        remaining = mover.trial.remaining
        left_s = math.inf if outlook.is_prior or remaining is None else remaining / rate
        over_s = min(max(self.horizon_s, mover.age_s), mover.restart_s + left_s)
        return max(_LEAST_PAID, 1 - mover.restart_s / over_s)

    def _worth(self, trial: TrialView, rate: float, terms: tuple[float, float, Scene, bool]) -> float:
        """What a goodput is worth under the objective."""
        base, fair, scene, is_prior = terms
        speedup = rate / base
        if self.name == "fair":
            return -1 / (speedup / max(fair, 1e-3) + _FAIR_FLOOR) ** 2
        remaining = trial.remaining
        if self.name == "deadline" and trial.deadline_s is not None and remaining is not None and not is_prior:
            needed = remaining / max(1.0, trial.deadline_s - scene.snapshot.now_s)
            return 10.0 * min(1.0, rate / max(needed, 1e-9)) + 0.1 * speedup
        return speedup if scene.knows_lengths else speedup**_DIMINISHING


def _least(menu: Menu) -> float:
    """The fewest units that a trial can run on; inf where it can run on nothing."""
    open_units = [units for units, value in zip(menu.devices, menu.values, strict=True) if value > -math.inf]
    return min(open_units, default=math.inf)


def _spread(menu: Menu) -> float:
    """How much more the best choice of a trial is worth than the worst."""
    values = [value for value in (*menu.values, menu.idle) if value > -math.inf]
    return max(values) - min(values) if values else 0.0


def _seconds_left(mover: Mover, outlook: Prospect) -> float:
    """Seconds that the rest of a trial would take on one device, as far as can be expected.

    Where no speed is known, as many as the device-seconds it has had: a new trial is expected to be short.
    """
    return mover.trial.attained_s if outlook.is_prior else mover.trial.expected_remaining / reference(outlook)


def _not_shorter(own_s: float, lengths: Sequence[float]) -> float:
    """Part of the trials that have no less time to go: those that would wait for this one."""
    return 1 - bisect_left(lengths, own_s) / len(lengths)
