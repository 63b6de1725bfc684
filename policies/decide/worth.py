"""What every size is worth to every movable trial under an objective: the values that `goodput_joint` chooses by.

A value is the trial's weight times a function of its speed-up over one whole device; the objective says which. A
restart reduces the value of a change by the part of the time in which the change has to pay off. If a trial has waited
for long although the devices suffice for the least size of every trial, getting nothing costs it more than anything can
gain. This module chooses nothing and does not place; called by `goodput_joint`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.policies.decide.candidates import Budget, Candidate
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.goodput_table import GoodputTable, reference
from orchestrator.policies.decide.placing import size_now
from orchestrator.policies.decide.sizes import Size, usual_counts
from orchestrator.policies.decide.sizing import NONE, Menu, Pool
from orchestrator.policies.snapshot import Snapshot, TrialView

OBJECTIVES = ("throughput", "fair", "search", "deadline")
_PARTS = 8
"""Devices are counted in so many parts where a trial may have a fraction of one."""
_FAIR_FLOOR = 0.02
_EVEN_CHANCE = 0.25
"""Chance to survive its next rung at which a trial counts half. The weight saturates: all trials have to be judged
before a search ends, and a leader alone on a device leaves most of what several would make of it."""
_HOPELESS = 0.3
"""Least weight in a search: a trial without a chance waits while others use the device nearly as well, but no longer,
since it too has to reach its rung before the search can end."""
_LONG_WAIT_S = 180.0
"""Seconds without a device after which a trial gets its least size from trials that hold more than theirs, whatever
their restarts cost."""
_LEAST_PAID = 0.05
"""Least part of its worth that a restart leaves."""
_SHORT_S = 100.0
"""Seconds alone on one device below which trials of unknown length count alike."""
_SERVICE_POWER = 0.7
"""Factor of `short_first` if the time to go is only expected."""
_DIMINISHING = 0.5
"""Exponent of speed-ups if lengths are unknown. The sum of plain speed-ups favours the trials that scale best, which
are the longest ones. Weights from known lengths correct that; weights from expected lengths do not."""


@dataclass(frozen=True)
class Scene:
    """What one decision is made from, and how devices are counted in it."""

    snapshot: Snapshot
    candidates: Sequence[Candidate]
    tables: Sequence[GoodputTable]
    fleet: Fleet

    def pairs(self) -> Iterator[tuple[Candidate, GoodputTable]]:
        """Every trial with its table."""
        return zip(self.candidates, self.tables, strict=True)

    @cached_property
    def knows_lengths(self) -> bool:
        """Whether the length of every trial is known."""
        return all(candidate.trial.target_samples is not None for candidate in self.candidates)

    @cached_property
    def usual(self) -> frozenset[int]:
        """Numbers of ranks that may be chosen; the others are for those that give up more than is taken."""
        return usual_counts(self.fleet, self.candidates)

    @cached_property
    def unit(self) -> int:
        """Units of a device: one where everybody has whole devices."""
        has_parts = any(candidate.share % 1 for candidate in self.candidates)
        every = {id(table.sizes): table.sizes for table in self.tables}.values()  # trials alike share theirs
        return _PARTS if has_parts or any(size.share < 1 for sizes in every for size in sizes) else 1

    def units(self, devices: float) -> int:
        """Devices in these units."""
        return max(1, round(devices * self.unit))

    def held(self, candidate: Candidate) -> int:
        """What a trial holds, in these units."""
        return self.units(candidate.share * len(candidate.seats)) if candidate.seats else 0

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
            members = tuple(i for i, candidate in enumerate(self.candidates) if candidate.trial.user == quota.user)
            pinned = [self.candidates[i] for i in members if self.candidates[i].is_pinned]
            held = sum(self.held(candidate) for candidate in pinned)
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
        fair = len(scene.fleet.devices) / len(scene.candidates)
        weights = self._weights(scene)
        return [
            self._menu(candidate, table, scene, (weight, fair))
            for (candidate, table), weight in zip(scene.pairs(), weights, strict=True)
        ]

    def urged(self, scene: Scene, menus: Sequence[Menu]) -> tuple[list[Menu], frozenset[int]]:
        """The menus with which every trial that has waited for too long is served, and the positions to be served.

        Getting nothing then costs such a trial more than all other choices together can be worth; and every running
        trial too, so that none loses its last device to it. Where no trial has waited for long, the menus stay as they
        are and no position is returned.
        """
        overdue = _served_by_their_least(scene, menus, self._waiting_for_long(scene, menus))
        if not overdue:
            return list(menus), frozenset()
        loss = math.fsum(_spread(menu) for menu in menus) + 1.0
        served = frozenset(i for i, candidate in enumerate(scene.candidates) if candidate.seats or i in overdue)
        return [replace(menu, idle=menu.idle - loss) if i in served else menu for i, menu in enumerate(menus)], served

    def _waiting_for_long(self, scene: Scene, menus: Sequence[Menu]) -> list[int]:
        """Trials that have waited for too long behind one that could give something up, the longest wait first.

        That one holds more than its least, has no less time to go and no higher priority. A long trial may wait for
        shorter ones, and in a search so may one with little chance.
        """
        waiting = [
            i
            for i, candidate in enumerate(scene.candidates)
            if not candidate.seats and candidate.in_force is not None and candidate.age_s >= _LONG_WAIT_S
            if self.urgency(candidate.trial) == 1
        ]
        if not waiting:
            return []
        holders = [
            (_seconds_left(candidate, table), candidate.trial.priority)
            for (candidate, table), menu in zip(scene.pairs(), menus, strict=True)
            if candidate.seats and not candidate.is_pinned and scene.held(candidate) > _least(menu)
        ]
        seconds = {i: _seconds_left(scene.candidates[i], scene.tables[i]) for i in waiting}
        found = [
            i
            for i in waiting
            if any(
                left_s >= seconds[i] and priority <= scene.candidates[i].trial.priority for left_s, priority in holders
            )
        ]
        return sorted(found, key=lambda i: (-scene.candidates[i].age_s, scene.candidates[i].trial_id))

    def _weights(self, scene: Scene) -> list[float]:
        """Weight, urgency and priority of every trial, and under `throughput` how soon it is likely to end."""
        weights = [
            candidate.trial.weight * self.urgency(candidate.trial) * 1000.0 ** min(2, max(0, candidate.trial.priority))
            for candidate in scene.candidates
        ]
        if self.name != "throughput":
            return weights
        seconds = [_seconds_left(candidate, table) for candidate, table in scene.pairs()]
        if scene.knows_lengths:
            ordered = sorted(seconds)
            soon = [_not_shorter(own_s, ordered) ** self.short_first for own_s in seconds]
        else:
            power = _SERVICE_POWER * self.short_first
            soon = [(_SHORT_S / (_SHORT_S + own_s)) ** power for own_s in seconds]
        return [weight * factor for weight, factor in zip(weights, soon, strict=True)]

    def _menu(self, candidate: Candidate, table: GoodputTable, scene: Scene, terms: tuple[float, float]) -> Menu:
        weight, fair = terms
        base, now, sizes = reference(table), size_now(candidate, scene.fleet), table.sizes
        at = sizes.index(now) if now is not None and now in sizes else NONE
        rates = [table.best(index) for index in range(len(sizes))]
        if at != NONE and scene.fleet.num_nodes(candidate.seats) > 1:
            rates[at] = table.across[at]
        values = []
        for index, rate in enumerate(rates):
            paid = rate * self._paid(candidate, table, rate) if candidate.seats and index != at and rate > 0 else rate
            value = weight * self._worth(candidate.trial, paid, (base, fair, scene, table.is_prior))
            is_open = rate > 0 and sizes[index].workers in scene.usual if not candidate.is_pinned else index == at
            values.append(value if is_open else -math.inf)
        idle = -math.inf if candidate.is_pinned and at != NONE else 0.0
        if self.name == "fair" and idle == 0:
            idle = -weight / _FAIR_FLOOR**2
        kinds, units = scene.counted(sizes)
        return Menu(kinds, units, tuple(values), idle)

    def _paid(self, candidate: Candidate, table: GoodputTable, rate: float) -> float:
        """Part of its time that a restart leaves a trial until it ends, or until it is likely to be changed again.

        It is expected to keep the next size for as long as it kept this one.
        """
        remaining = candidate.trial.remaining
        left_s = math.inf if table.is_prior or remaining is None else remaining / rate
        over_s = min(max(self.horizon_s, candidate.age_s), candidate.restart_s + left_s)
        return max(_LEAST_PAID, 1 - candidate.restart_s / over_s)

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


def _served_by_their_least(scene: Scene, menus: Sequence[Menu], waiting: Sequence[int]) -> set[int]:
    """Those of the waiting trials, in order, whose least fits beside the least of all that run, quotas included."""
    if not waiting:
        return set()
    pools = [
        ((), float(len(scene.fleet.devices) * scene.unit)),
        *((pool.members, float(pool.most)) for pool in scene.pools),
    ]
    rooms = dict(pools)

    def take(position: int, units: float) -> None:
        for members in rooms:
            if not members or position in members:
                rooms[members] -= units

    for i, candidate in enumerate(scene.candidates):
        if candidate.seats:
            take(i, scene.held(candidate) if candidate.is_pinned else _least(menus[i]))
    served: set[int] = set()
    for i in waiting:
        if all(_least(menus[i]) <= room for members, room in rooms.items() if not members or i in members):
            take(i, _least(menus[i]))
            served.add(i)
    return served


def _least(menu: Menu) -> float:
    """The fewest units that a trial can run on; inf where it can run on nothing."""
    open_units = [units for units, value in zip(menu.devices, menu.values, strict=True) if value > -math.inf]
    return min(open_units, default=math.inf)


def _spread(menu: Menu) -> float:
    """How much more the best choice of a trial is worth than the worst."""
    values = [value for value in (*menu.values, menu.idle) if value > -math.inf]
    return max(values) - min(values) if values else 0.0


def _seconds_left(candidate: Candidate, table: GoodputTable) -> float:
    """Seconds that the rest of a trial would take on one device, as far as can be expected.

    Where no speed is known, as many as the device-seconds it has had: a new trial is expected to be short.
    """
    return candidate.trial.attained_s if table.is_prior else candidate.trial.expected_remaining / reference(table)


def _not_shorter(own_s: float, lengths: Sequence[float]) -> float:
    """Part of the trials that have no less time to go: those that would wait for this one."""
    return 1 - bisect_left(lengths, own_s) / len(lengths)
