"""One joint decision for a fleet: devices, ranks, batch, tier and pause of every trial, by predicted goodput.

For each trial every size is weighed with its best batch, split and tier (`policies.prospects`); sizes are chosen for
all trials at once (`policies.sizing`), what a restart would cost taken off; placed by `policies.placing`. A new
division is only taken if it gains `min_gain` over keeping who runs where it is, and not within `cooldown_s` of the
last change unless trials came or went. Trials that cannot move are served as by `goodput`, their speed-ups worth what
the objective says; those of them whose number of ranks may be chosen are resized where that pays (`policies.resizing`).
Where nodes can be asked for, it also says how many of each type are worth their price (`policies.node_wish`).
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.policies.exploring import with_trials_of_tiers
from orchestrator.policies.fleet import Fleet
from orchestrator.policies.goodput_policy import Goodput
from orchestrator.policies.invariants import MAX_ALTERNATIVES
from orchestrator.policies.movable import Budget, Mover, keep, run, split, wait
from orchestrator.policies.node_wish import NodeTerms, Worth, wishes
from orchestrator.policies.node_worth import FleetWorth, SlotWorth, catalogue
from orchestrator.policies.placing import Given, realise, size_now, trimmed
from orchestrator.policies.plan import Allocation, Alternative, Plan, Settings, TrialId
from orchestrator.policies.prospects import Ask, Prospect, Size, goodput_now, prospects, reference, usable_tiers
from orchestrator.policies.resizing import Terms, with_resizes
from orchestrator.policies.sizing import NONE, Menu, Pool, best_counts, climb_sizes, total
from orchestrator.policies.snapshot import Snapshot, TrialView
from orchestrator.policies.world import make_plan

OBJECTIVES = ("throughput", "fair", "search", "deadline")
_FRACTIONS = (0.125, 0.25, 0.5)
_PARTS = 8
"""Devices are counted in so many parts where a trial may have a fraction of one."""
_MAX_EXACT = 300_000_000
"""Trials times options times capacity up to which sizes are chosen exactly."""
_MIN_DIAL_GAIN = 0.05
"""For trials that stay where they are: a dial that is turned costs no restart, so nothing but this keeps it still."""
_FAIR_FLOOR = 0.02
_EVEN_CHANCE = 0.25
"""Chance to survive its next rung at which a trial counts half. The weight saturates: all trials have to be judged
before a search ends, and a leader alone on a device leaves most of what several would make of it."""
_HOPELESS = 0.3
"""Least weight in a search: whoever has no chance waits as long as others make nearly as much of the device, not
longer, since it too has to reach its rung before the search can end."""
_NEAR_BATCH = 1.25
"""A batch within this factor of the best one is not worth a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputJoint:
    """Goodput over all dials at once.

    Attributes:
        objective: `throughput` (trials per hour: the sum of speed-ups, short trials first), `fair` (who has least of
            its fair share first), `search` (weighted by the chance to survive the next rung), `deadline` (in time).
        min_gain: predicted relative gain of the objective, restarts charged, below which nothing is moved.
        cooldown_s: seconds after a change in which devices are not divided anew, unless trials came or went.
        horizon_s: time over which the cost of a restart has to pay off.
        short_first: 0 treats long and short trials alike, 1 weighs them by the inverse of their remaining time.
        uses_fractions: whether a trial may get an eighth, a quarter or half of a device, where its limits allow it.
        min_return: goodput per price that a node needs to be asked for, over that of the best first node; 1 buys no
            node that earns less per price than the best, 0.5 one that earns half of it.
        node_cooldown_s: seconds after a change in which the number of nodes does not change the other way.
    """

    objective: str = "throughput"
    min_gain: float = 0.01
    cooldown_s: float = 60.0
    horizon_s: float = 300.0
    short_first: float = 0.5
    uses_fractions: bool = True
    min_return: float = 0.5
    node_cooldown_s: float = 120.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}; allowed: {', '.join(OBJECTIVES)}")
        if not 0 <= self.min_gain < 10:
            raise ValueError(f"min_gain={self.min_gain!r}; allowed: 0 to 10, such as 0.05 for 5 %")
        if not self.cooldown_s >= 0:
            raise ValueError(f"cooldown_s={self.cooldown_s!r}; allowed: seconds >= 0")
        if not self.horizon_s > 0:
            raise ValueError(f"horizon_s={self.horizon_s!r}; allowed: seconds > 0")
        if not 0 <= self.short_first <= 1:
            raise ValueError(f"short_first={self.short_first!r}; allowed: 0 to 1")
        if not 0 < self.min_return <= 1:
            raise ValueError(f"min_return={self.min_return!r}; allowed: above 0, to 1, a part of the best return")
        if not self.node_cooldown_s >= 0:
            raise ValueError(f"node_cooldown_s={self.node_cooldown_s!r}; allowed: seconds >= 0")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan with the best objective that is worth its changes."""
        rest, movers, fleet = split(snapshot)
        urgency = {trial.trial_id: self._urgency(trial) for trial in rest.trials}
        guarantee = 1.0 if self.objective == "fair" else 0.5
        terms = self._terms
        turned = Goodput(guarantee=guarantee, min_gain=terms.min_gain, cooldown_s=min(10.0, self.cooldown_s))
        rows = list(turned.decide_by(rest, urgency).allocations)
        rows = with_resizes(snapshot, rows, terms)
        if movers:
            rows += self._place(snapshot, movers, fleet)
        plan = make_plan(snapshot, "goodput_joint", rows)
        if not snapshot.node_types:
            return plan
        node_terms = NodeTerms(min_return=self.min_return, cooldown_s=self.node_cooldown_s)
        return dataclasses.replace(plan, nodes=wishes(snapshot, self._worth_of_nodes(snapshot), node_terms))

    def _worth_of_nodes(self, snapshot: Snapshot) -> Worth:
        """What nodes are worth: to trials that may be placed anew, or to those in slots where none may."""
        trials = (*snapshot.trials, *snapshot.waiting)
        if not any(trial.limits.can_move for trial in trials):
            return SlotWorth(snapshot)
        whole = dataclasses.replace(
            snapshot, devices=catalogue(snapshot), trials=tuple(sorted(trials, key=lambda t: t.trial_id))
        )
        _, movers, fleet = split(whole)
        scene = self._scene(whole, movers, fleet)
        return FleetWorth(snapshot, fleet, self._menus(scene), scene.unit)

    @property
    def _terms(self) -> Terms:
        """When a trial that stays where it is turns a dial or its number of ranks."""
        least = max(_MIN_DIAL_GAIN, self.min_gain)
        return Terms(min_gain=least, cooldown_s=self.cooldown_s, horizon_s=self.horizon_s)

    def _urgency(self, trial: TrialView) -> float:
        """What the objective makes of a trial apart from its speed."""
        if self.objective == "search" and trial.survival is not None and trial.loss is not None:
            return max(_HOPELESS, trial.survival / (trial.survival + _EVEN_CHANCE))
        return 1.0

    def _scene(self, snapshot: Snapshot, movers: tuple[Mover, ...], fleet: Fleet) -> _Scene:
        """The movable trials of a snapshot with what each would make of each size of the fleet."""
        fractions = _FRACTIONS if self.uses_fractions else ()
        return _Scene(snapshot, movers, prospects(movers, fleet, Ask(fractions=fractions)), fleet)

    def _place(self, snapshot: Snapshot, movers: tuple[Mover, ...], fleet: Fleet) -> Iterator[Allocation]:
        scene = self._scene(snapshot, movers, fleet)
        if self._rests(scene):
            for mover in movers:
                if mover.seats:
                    yield keep(mover, fleet, f"keeps its {len(mover.seats)} devices, a change is recent", "cooldown")
                else:
                    yield wait(mover, f"waits, devices were divided less than {self.cooldown_s:.0f} s ago", "cooldown")
            return
        chosen, why = self._choose(scene)
        wanted: dict[TrialId, Size] = {
            mover.trial_id: outlook.sizes[choice]
            for (mover, outlook), choice in zip(scene.pairs(), chosen, strict=True)
            if choice != NONE
        }
        given = realise(movers, wanted, fleet, Budget(snapshot))
        rows = [self._row(mover, outlook, fleet, given, why) for mover, outlook in scene.pairs()]
        yield from with_trials_of_tiers(tuple(scene.pairs()), rows, fleet, self.cooldown_s)

    def _rests(self, scene: _Scene) -> bool:
        """Whether devices stay as they are: somebody changed a moment ago, and nobody came, left or lost a device."""
        known = {trial.trial_id for trial in scene.snapshot.trials}
        if any(row.trial_id not in known for row in scene.snapshot.plan.allocations):
            return False
        is_calm = all(m.in_force is not None and (m.seats or m.in_force.share == 0) for m in scene.movers)
        return is_calm and min(m.age_s for m in scene.movers) < self.cooldown_s

    def _menus(self, scene: _Scene) -> list[Menu]:
        alone_s = [_alone_s(mover, outlook) for mover, outlook in scene.pairs()]
        lengths = sorted(s for s in alone_s if s is not None)
        fair = len(scene.fleet.devices) / len(scene.movers)
        menus = []
        for (mover, outlook), own_s in zip(scene.pairs(), alone_s, strict=True):
            weight = mover.trial.weight * self._urgency(mover.trial) * 1000.0 ** min(2, max(0, mover.trial.priority))
            if self.objective == "throughput":
                weight *= _not_shorter(own_s, lengths) ** self.short_first
            menus.append(self._menu(mover, outlook, scene, (weight, fair)))
        return menus

    def _menu(self, mover: Mover, outlook: Prospect, scene: _Scene, terms: tuple[float, float]) -> Menu:
        weight, fair = terms
        base, now, sizes = reference(outlook), size_now(mover, scene.fleet), outlook.sizes
        at = sizes.index(now) if now is not None and now in sizes else NONE
        rates = [inside or across for inside, across in zip(outlook.inside, outlook.across, strict=True)]
        if at != NONE and scene.fleet.num_nodes(mover.seats) > 1:
            rates[at] = outlook.across[at]
        left = math.inf if outlook.is_prior else mover.trial.remaining
        values = []
        for index, rate in enumerate(rates):
            worth = rate
            if mover.seats and index != at and rate > 0:
                # What a restart leaves of the time in which it has to pay off, or of the time to the trial's end.
                worth *= max(0.05, 1 - mover.restart_s / min(self.horizon_s, mover.restart_s + left / rate))
            value = weight * self._worth(
                mover.trial, worth / base, fair, (worth, scene.snapshot.now_s, outlook.is_prior)
            )
            is_open = rate > 0 if not mover.is_pinned else index == at
            values.append(value if is_open else -math.inf)
        idle = -math.inf if mover.is_pinned and at != NONE else 0.0
        if self.objective == "fair" and idle == 0:
            idle = -weight / _FAIR_FLOOR**2
        kinds, units = scene.counted(sizes)
        return Menu(kinds, units, tuple(values), idle)

    def _worth(self, trial: TrialView, speedup: float, fair: float, terms: tuple[float, float, bool]) -> float:
        """What a speed-up over one device is worth under the objective."""
        rate, now_s, is_prior = terms
        if self.objective == "fair":
            return -1 / (speedup / max(fair, 1e-3) + _FAIR_FLOOR) ** 2
        if self.objective == "deadline" and trial.deadline_s is not None and not is_prior:
            needed = trial.remaining / max(1.0, trial.deadline_s - now_s)
            return 10.0 * min(1.0, rate / max(needed, 1e-9)) + 0.1 * speedup
        return speedup

    def _choose(self, scene: _Scene) -> tuple[list[int], str]:
        """The option of every trial: a new division if it is worth it, else the present one with gaps filled."""
        menus = self._menus(scene)
        held = [
            _only(menu, outlook.sizes, now) if (now := size_now(mover, scene.fleet)) is not None else menu
            for (mover, outlook), menu in zip(scene.pairs(), menus, strict=True)
        ]
        anew, same = _solve(scene, menus), _solve(scene, held)
        before, after = total(menus, same), total(menus, anew)
        if not math.isfinite(before) or after >= before + self.min_gain * abs(before) + 1e-12:
            gained = (after - before) / abs(before) if before and math.isfinite(before) else 0.0
            return anew, f"a new division gains {gained:.1%} of {self.objective}"
        gained = (after - before) / abs(before) if before else 0.0
        return same, f"a new division would gain {max(0.0, gained):.1%}, less than {self.min_gain:.1%}"

    def _row(
        self, mover: Mover, outlook: Prospect, fleet: Fleet, given: Mapping[TrialId, Given], why: str
    ) -> Allocation:
        if mover.trial_id not in given:
            return wait(mover, f"waits: {len(given)} trials are worth more on {len(fleet.devices)} devices; {why}")
        if mover.is_pinned:
            return keep(mover, fleet, f"keeps its {len(mover.seats)} devices", "pinned")
        kind = fleet.type_of[given[mover.trial_id][0][0]]
        fitting = trimmed(given[mover.trial_id], kind, outlook.sizes)
        if fitting is None:
            return wait(mover, f"waits: none of its sizes fits into {len(given[mover.trial_id][0])} devices; {why}")
        seats, share = fitting
        size = Size(kind, len(seats), share)
        index, spans = outlook.sizes.index(size), fleet.num_nodes(seats) > 1
        rate, before = outlook.goodput(index, spans_nodes=spans), goodput_now(mover, outlook, fleet)
        dials = _calm(mover, outlook, outlook.dials(index, spans_nodes=spans))
        reason = f"{share * len(seats):g} devices, speed-up {rate / reference(outlook):.2f} over one; {why}"
        binding = "growth" if index == len(outlook.sizes) - 1 else "devices"
        row = run(mover, fleet, seats, dials, reason, binding=binding, predicted=None if outlook.is_prior else rate)
        gain = None if outlook.is_prior or not before else rate / before - 1
        return dataclasses.replace(row, predicted_gain=gain, alternatives=_alternatives(outlook, index))


@dataclass(frozen=True)
class _Scene:
    """What one decision is made from, and how devices are counted in it."""

    snapshot: Snapshot
    movers: Sequence[Mover]
    outlooks: Sequence[Prospect]
    fleet: Fleet

    def pairs(self) -> Iterator[tuple[Mover, Prospect]]:
        """Every trial with its prospect."""
        return zip(self.movers, self.outlooks, strict=True)

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


def _solve(scene: _Scene, menus: Sequence[Menu]) -> list[int]:
    """Exactly for one type of device, unless that takes too long."""
    capacities = [scene.fleet.capacity(kind) * scene.unit for kind in range(len(scene.fleet.types))]
    work = sum(len(menu.values) for menu in menus) + sum(pool.most for pool in scene.pools)
    if len(capacities) == 1 and work * capacities[0] <= _MAX_EXACT:
        return best_counts(menus, capacities[0], scene.pools)
    return climb_sizes(menus, capacities, scene.pools)


def _alone_s(mover: Mover, outlook: Prospect) -> float | None:
    """Seconds that the rest of a trial would take on one device; None where no speed is known."""
    return None if outlook.is_prior else mover.trial.remaining / reference(outlook)


def _not_shorter(own_s: float | None, lengths: Sequence[float]) -> float:
    """Part of the trials that have no less time to go: those that would wait for this one. Half where it is unknown."""
    return 0.5 if own_s is None else 1 - bisect_left(lengths, own_s) / len(lengths)


def _only(menu: Menu, sizes: Sequence[Size], now: Size) -> Menu:
    """The menu of a trial that keeps the size it has; the whole menu if that is none of its sizes."""
    if now not in sizes:
        return menu
    index = sizes.index(now)
    values = tuple(value if i == index else -math.inf for i, value in enumerate(menu.values))
    return dataclasses.replace(menu, values=values)


def _calm(mover: Mover, outlook: Prospect, best: Settings) -> Settings:
    """The best dials, or those in force where the batch is near enough and nothing else differs.

    A tier is left for another only where that computes faster by `_MIN_DIAL_GAIN`.
    """
    old = mover.in_force
    if old is not None and old.tier is not best.tier and old.tier in usable_tiers(mover):
        gain = outlook.tier_gain(best, old.tier)
        if gain is not None and gain < _MIN_DIAL_GAIN:
            best = dataclasses.replace(best, tier=old.tier)
    if old is None or (old.num_workers, old.tier, old.share) != (best.num_workers, best.tier, best.share):
        return best
    limits = mover.trial.limits
    near = max(old.global_batch, best.global_batch) <= _NEAR_BATCH * min(old.global_batch, best.global_batch)
    legal = limits.min_global_batch <= old.global_batch <= limits.max_global_batch
    return old if near and legal and old.micro_batch <= limits.max_micro_batch else best


def _alternatives(outlook: Prospect, chosen: int) -> tuple[Alternative, ...]:
    """The sizes next to the chosen one, with the goodput they would have."""
    if outlook.is_prior:
        return ()
    nearest = sorted((abs(i - chosen), i) for i in range(len(outlook.sizes)) if i != chosen)[:MAX_ALTERNATIVES]
    found = []
    for _, index in nearest:
        spans = not outlook.inside[index] > 0
        rate = outlook.goodput(index, spans_nodes=spans)
        if rate > 0:
            found.append(Alternative(settings=outlook.dials(index, spans_nodes=spans), goodput=rate))
    return tuple(found)
