"""One joint decision for a fleet: devices, ranks, batch, tier and pause of every trial, by predicted goodput.

For each trial every size is weighed with its best batch, split and tier (`policies.decide.goodput_table`) and valued
under the objective (`policies.decide.worth`). Sizes are chosen for all trials at once (`policies.decide.sizing`) and
placed by `policies.decide.placing`. A new division is only taken if it gains `min_gain` over keeping who runs where it
is, and not within `cooldown_s` of the last change unless trials came or went. Trials that cannot move are served as by
`goodput`, their speed-ups worth what the objective says; those of them whose number of ranks may be chosen are resized
where that pays (`policies.decide.resizing`). Where nodes can be asked for, it also says how many of each type are worth
their price (`policies.decide.node_wish`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, split, wait
from orchestrator.policies.decide.exploring import with_trials_of_tiers
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.decide.goodput_table import (
    GoodputTable,
    goodput_now,
    goodput_tables,
    reference,
    usable_tiers,
)
from orchestrator.policies.decide.node_wish import NodeTerms, Worth, wishes
from orchestrator.policies.decide.node_worth import FleetWorth, SlotWorth, catalogue
from orchestrator.policies.decide.placing import Given, realise, size_now, trimmed
from orchestrator.policies.decide.resizing import Terms, with_resizes
from orchestrator.policies.decide.sizes import SearchSpace, Size
from orchestrator.policies.decide.sizing import NONE, Menu, best_counts, climb_sizes, total
from orchestrator.policies.decide.worth import OBJECTIVES, Objective, Scene
from orchestrator.policies.invariants import MAX_ALTERNATIVES
from orchestrator.policies.plan import Allocation, Alternative, Plan, Settings, TrialId
from orchestrator.policies.snapshot import Snapshot

_FRACTIONS = (0.125, 0.25, 0.5)
_MAX_EXACT = 300_000_000
"""Trials times options times capacity up to which sizes are chosen exactly."""
_MIN_DIAL_GAIN = 0.05
"""For trials that stay where they are: a dial that is turned costs no restart, so nothing but this keeps it still."""
_NEAR_BATCH = 1.25
"""A batch within this factor of the best one is not worth a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputJoint:
    """Goodput over all dials at once.

    Attributes:
        objective: `throughput` (trials per hour: the sum of speed-ups, short trials first; where a length is unknown,
            those that have done least first), `fair` (who has least of its fair share first), `search` (weighted by
            the chance to survive the next rung), `deadline` (in time).
        min_gain: predicted relative gain of the objective, restarts charged, below which nothing is moved.
        cooldown_s: seconds after a change in which the sizes of running trials stay, unless trials came or went.
        horizon_s: time over which the cost of a restart has to pay off at least.
        short_first: 0 treats long and short trials alike; the larger, the more the weight falls with the time to go.
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
        rest, candidates, fleet = split(snapshot)
        urgency = {trial.trial_id: self._objective.urgency(trial) for trial in rest.trials}
        guarantee = 1.0 if self.objective == "fair" else 0.5
        terms = self._terms
        turned = Goodput(guarantee=guarantee, min_gain=terms.min_gain, cooldown_s=min(10.0, self.cooldown_s))
        rows = list(turned.decide_by(rest, urgency).allocations)
        rows = with_resizes(snapshot, rows, terms)
        if candidates:
            rows += self._place(snapshot, candidates, fleet)
        plan = make_plan(snapshot, "goodput_joint", rows)
        if not snapshot.node_types:
            return plan
        node_terms = NodeTerms(min_return=self.min_return, cooldown_s=self.node_cooldown_s)
        return dataclasses.replace(plan, nodes=wishes(snapshot, self._worth_of_nodes(snapshot), node_terms))

    def _worth_of_nodes(self, snapshot: Snapshot) -> Worth:
        """What nodes are worth to trials that can move, or to those in slots if none can."""
        trials = (*snapshot.trials, *snapshot.waiting)
        if not any(trial.limits.can_move for trial in trials):
            return SlotWorth(snapshot)
        whole = dataclasses.replace(
            snapshot, devices=catalogue(snapshot), trials=tuple(sorted(trials, key=lambda t: t.trial_id))
        )
        _, candidates, fleet = split(whole)
        scene = self._scene(whole, candidates, fleet)
        return FleetWorth(snapshot, fleet, self._objective.menus(scene), scene.unit)

    @property
    def _terms(self) -> Terms:
        """When a trial that stays where it is turns a dial or its number of ranks."""
        least = max(_MIN_DIAL_GAIN, self.min_gain)
        return Terms(min_gain=least, cooldown_s=self.cooldown_s, horizon_s=self.horizon_s)

    @property
    def _objective(self) -> Objective:
        """What sizes are valued by."""
        return Objective(name=self.objective, short_first=self.short_first, horizon_s=self.horizon_s)

    def _scene(self, snapshot: Snapshot, candidates: tuple[Candidate, ...], fleet: Fleet) -> Scene:
        """The movable trials of a snapshot with what each would make of each size of the fleet."""
        fractions = _FRACTIONS if self.uses_fractions else ()
        return Scene(snapshot, candidates, goodput_tables(candidates, fleet, SearchSpace(fractions=fractions)), fleet)

    def _place(self, snapshot: Snapshot, candidates: tuple[Candidate, ...], fleet: Fleet) -> Iterator[Allocation]:
        scene = self._scene(snapshot, candidates, fleet)
        if self._rests(scene):
            for candidate in candidates:
                if candidate.seats:
                    yield keep(
                        candidate, fleet, f"keeps its {len(candidate.seats)} devices, a change is recent", "cooldown"
                    )
                else:
                    yield wait(
                        candidate, f"waits, devices were divided less than {self.cooldown_s:.0f} s ago", "cooldown"
                    )
            return
        chosen, why = self._choose(scene)
        chosen = _kept_devices(scene, chosen)
        wanted: dict[TrialId, Size] = {
            candidate.trial_id: table.sizes[choice]
            for (candidate, table), choice in zip(scene.pairs(), chosen, strict=True)
            if choice != NONE
        }
        given = realise(candidates, wanted, fleet, Budget(snapshot))
        rows = [self._row(candidate, table, fleet, given, why) for candidate, table in scene.pairs()]
        yield from with_trials_of_tiers(tuple(scene.pairs()), rows, fleet, self.cooldown_s)

    def _rests(self, scene: Scene) -> bool:
        """Whether devices stay: a trial changed within `cooldown_s`, and none came, left or lost a device."""
        known = {trial.trial_id for trial in scene.snapshot.trials}
        if any(row.trial_id not in known for row in scene.snapshot.plan.allocations):
            return False
        is_calm = all(m.in_force is not None and (m.seats or m.in_force.share == 0) for m in scene.candidates)
        return is_calm and min(m.age_s for m in scene.candidates) < self.cooldown_s

    def _choose(self, scene: Scene) -> tuple[list[int], str]:
        """The option of every trial: a new division if it is worth it, else the present one with gaps filled."""
        menus = self._objective.menus(scene)
        urged, served = self._objective.urged(scene, menus)
        held = [
            _only(menu, table.sizes, now) if (now := size_now(candidate, scene.fleet)) is not None else menu
            for (candidate, table), menu in zip(scene.pairs(), urged, strict=True)
        ]
        anew, same = _solve(scene, urged), _solve(scene, held)
        num_left = sum(same[i] == NONE and anew[i] != NONE for i in served)
        if num_left:
            return anew, f"a new division serves {num_left} that have waited for long"
        before, after = total(menus, same), total(menus, anew)
        if not math.isfinite(before) or after >= before + self.min_gain * abs(before) + 1e-12:
            gained = (after - before) / abs(before) if before and math.isfinite(before) else 0.0
            return anew, f"a new division gains {gained:.1%} of {self.objective}"
        gained = (after - before) / abs(before) if before else 0.0
        return same, f"a new division would gain {max(0.0, gained):.1%}, less than {self.min_gain:.1%}"

    def _row(
        self, candidate: Candidate, table: GoodputTable, fleet: Fleet, given: Mapping[TrialId, Given], why: str
    ) -> Allocation:
        if candidate.trial_id not in given:
            return wait(candidate, f"waits: {len(given)} trials are worth more on {len(fleet.devices)} devices; {why}")
        if candidate.is_pinned:
            return keep(candidate, fleet, f"keeps its {len(candidate.seats)} devices", "pinned")
        kind = fleet.type_of[given[candidate.trial_id][0][0]]
        fitting = trimmed(given[candidate.trial_id], kind, table.sizes)
        if fitting is None:
            return wait(
                candidate, f"waits: none of its sizes fits into {len(given[candidate.trial_id][0])} devices; {why}"
            )
        seats, share = fitting
        size = Size(kind, len(seats), share)
        index, spans = table.sizes.index(size), fleet.num_nodes(seats) > 1
        rate, before = table.goodput(index, spans_nodes=spans), goodput_now(candidate, table, fleet)
        dials = _calm(candidate, table, table.dials(index, spans_nodes=spans))
        reason = f"{share * len(seats):g} devices, speed-up {rate / reference(table):.2f} over one; {why}"
        binding = "growth" if index == len(table.sizes) - 1 else "devices"
        row = run(candidate, fleet, seats, dials, reason, binding=binding, predicted=None if table.is_prior else rate)
        gain = None if table.is_prior or not before else rate / before - 1
        return dataclasses.replace(row, predicted_gain=gain, alternatives=_alternatives(table, index))


def _kept_devices(scene: Scene, chosen: Sequence[int]) -> list[int]:
    """The options, with more devices for trials that would give up devices that no other trial takes.

    Such a trial restarts in any case. So it goes from 64 to 61 devices for three others, and not to 48, the next usual
    number. Trials of users with a quota keep what was chosen.
    """
    found, fleet = list(chosen), scene.fleet
    idle = [float(fleet.capacity(kind)) for kind in range(len(fleet.types))]
    for table, choice in zip(scene.tables, chosen, strict=True):
        if choice != NONE:
            idle[table.sizes[choice].kind] -= table.sizes[choice].devices
    bound = {i for pool in scene.pools for i in pool.members}
    for i, (candidate, table) in enumerate(scene.pairs()):
        now, choice = size_now(candidate, fleet), chosen[i]
        if now is None or choice == NONE or i in bound:
            continue
        new = table.sizes[choice]
        more = [
            index
            for index, size in enumerate(table.sizes)
            if (size.kind, size.share) == (now.kind, now.share) == (new.kind, new.share)
            and new.workers < size.workers < now.workers
            and size.workers - new.workers <= idle[new.kind] + 1e-9
            and table.best(index) > table.best(choice)
        ]
        if more:
            found[i] = max(more, key=lambda index: table.sizes[index].workers)
            idle[new.kind] -= table.sizes[found[i]].devices - new.devices
    return found


def _solve(scene: Scene, menus: Sequence[Menu]) -> list[int]:
    """Exactly for one type of device, unless that takes too long."""
    capacities = [scene.fleet.capacity(kind) * scene.unit for kind in range(len(scene.fleet.types))]
    work = sum(len(menu.values) for menu in menus) + sum(pool.most for pool in scene.pools)
    if len(capacities) == 1 and work * capacities[0] <= _MAX_EXACT:
        return best_counts(menus, capacities[0], scene.pools)
    return climb_sizes(menus, capacities, scene.pools)


def _only(menu: Menu, sizes: Sequence[Size], now: Size) -> Menu:
    """The menu of a trial that keeps the size it has; the whole menu if that is none of its sizes."""
    if now not in sizes:
        return menu
    index = sizes.index(now)
    values = tuple(value if i == index else -math.inf for i, value in enumerate(menu.values))
    return dataclasses.replace(menu, values=values)


def _calm(candidate: Candidate, table: GoodputTable, best: Settings) -> Settings:
    """The best dials, or those in force where the batch is near enough and nothing else differs.

    A tier is left for another only where that computes faster by `_MIN_DIAL_GAIN`.
    """
    old = candidate.in_force
    if old is not None and old.tier is not best.tier and old.tier in usable_tiers(candidate):
        gain = table.tier_gain(best, old.tier)
        if gain is not None and gain < _MIN_DIAL_GAIN:
            best = dataclasses.replace(best, tier=old.tier)
    if old is None or (old.num_workers, old.tier, old.share) != (best.num_workers, best.tier, best.share):
        return best
    limits = candidate.trial.limits
    near = max(old.global_batch, best.global_batch) <= _NEAR_BATCH * min(old.global_batch, best.global_batch)
    legal = limits.min_global_batch <= old.global_batch <= limits.max_global_batch
    return old if near and legal and old.micro_batch <= limits.max_micro_batch else best


def _alternatives(table: GoodputTable, chosen: int) -> tuple[Alternative, ...]:
    """The sizes next to the chosen one, with the goodput they would have."""
    if table.is_prior:
        return ()
    nearest = sorted((abs(i - chosen), i) for i in range(len(table.sizes)) if i != chosen)[:MAX_ALTERNATIVES]
    found = []
    for _, index in nearest:
        spans = not table.inside[index] > 0
        rate = table.goodput(index, spans_nodes=spans)
        if rate > 0:
            found.append(Alternative(settings=table.dials(index, spans_nodes=spans), goodput=rate))
    return tuple(found)
