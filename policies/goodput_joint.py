"""One joint decision for a fleet: devices, ranks, batch, tier and pause of every trial, by predicted goodput.

For each trial every size is weighed with its best batch, split and tier (`policies.prospects`); sizes are chosen for
all trials at once (`policies.sizing`), what a restart would cost taken off; placed by `policies.placing`. A new
division is only taken if it gains `min_gain` over keeping who runs where it is, and not within `cooldown_s` of the
last change unless trials came or went. Trials that cannot move are served as by `goodput`, weighted by the same
objective; those of them whose number of ranks may be chosen are resized where that pays (`policies.resizing`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from policies.fleet import Fleet
from policies.goodput_policy import Goodput
from policies.invariants import MAX_ALTERNATIVES
from policies.movable import Budget, Mover, keep, run, split, wait
from policies.placing import Given, realise, size_now
from policies.plan import Allocation, Alternative, Plan, Settings, TrialId
from policies.prospects import Ask, Prospect, Size, goodput_now, prospects, reference, with_share
from policies.resizing import Terms, with_resizes
from policies.sizing import NONE, Menu, best_counts, climb_sizes, total
from policies.snapshot import Snapshot, TrialView
from policies.world import make_plan

OBJECTIVES = ("throughput", "fair", "search", "deadline")
_PARTS = 8
"""Fractions of a device are counted in eighths."""
_MAX_EXACT = 300_000_000
"""Trials times options times capacity up to which sizes are chosen exactly."""
_FAIR_FLOOR = 0.02
_NEAR_BATCH = 1.25
"""A batch within this factor of the best one is not worth a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputJoint:
    """Goodput over all dials at once.

    Attributes:
        objective: `throughput` (trials per hour: the sum of speed-ups, short trials first), `fair` (who has least of
            its fair share first), `search` (weighted by the chance to survive the next rung), `deadline` (in time).
        min_gain: predicted relative gain of the objective below which nothing is moved.
        cooldown_s: seconds after a change in which devices are not divided anew, unless trials came or went.
        horizon_s: time over which the cost of a restart has to pay off.
        short_first: 0 treats long and short trials alike, 1 weighs them by the inverse of their remaining time.
        uses_fractions: whether a trial may get a quarter or half of a device.
    """

    objective: str = "throughput"
    min_gain: float = 0.05
    cooldown_s: float = 60.0
    horizon_s: float = 600.0
    short_first: float = 0.5
    uses_fractions: bool = False

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

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan with the best objective that is worth its changes."""
        rest, movers, fleet = split(snapshot)
        weighed = tuple(dataclasses.replace(trial, weight=trial.weight * self._urgency(trial)) for trial in rest.trials)
        guarantee = 1.0 if self.objective == "fair" else 0.5
        turned = Goodput(guarantee=guarantee, min_gain=self.min_gain, cooldown_s=min(10.0, self.cooldown_s))
        rows = list(turned.decide(dataclasses.replace(rest, trials=weighed)).allocations)
        rows = with_resizes(snapshot, rows, self._terms)
        if movers:
            rows += self._place(snapshot, movers, fleet)
        return make_plan(snapshot, "goodput_joint", rows)

    @property
    def _terms(self) -> Terms:
        return Terms(min_gain=self.min_gain, cooldown_s=self.cooldown_s, horizon_s=self.horizon_s)

    def _urgency(self, trial: TrialView) -> float:
        """What the objective makes of a trial apart from its speed."""
        if self.objective == "search" and trial.survival is not None:
            return max(0.02, trial.survival)
        return 1.0

    def _place(self, snapshot: Snapshot, movers: tuple[Mover, ...], fleet: Fleet) -> Iterator[Allocation]:
        fractions = (0.25, 0.5) if self.uses_fractions else ()
        outlooks = prospects(movers, fleet, Ask(fractions=fractions))
        if self._rests(snapshot, movers):
            for mover in movers:
                if mover.seats:
                    yield keep(mover, fleet, f"keeps its {len(mover.seats)} devices, a change is recent", "cooldown")
                else:
                    yield wait(mover, f"waits, devices were divided less than {self.cooldown_s:.0f} s ago", "cooldown")
            return
        menus = self._menus(snapshot, movers, outlooks, fleet)
        chosen, why = self._choose(snapshot, movers, (menus, outlooks), fleet)
        wanted: dict[TrialId, Size] = {
            mover.trial_id: outlook.sizes[choice]
            for mover, outlook, choice in zip(movers, outlooks, chosen, strict=True)
            if choice != NONE
        }
        given = realise(movers, wanted, fleet, Budget(snapshot))
        for mover, outlook in zip(movers, outlooks, strict=True):
            yield self._row(mover, outlook, fleet, given, why)

    def _rests(self, snapshot: Snapshot, movers: Sequence[Mover]) -> bool:
        """Whether devices stay as they are: somebody changed a moment ago, and nobody came, left or lost a device."""
        known = {trial.trial_id for trial in snapshot.trials}
        if any(row.trial_id not in known for row in snapshot.plan.allocations):
            return False
        is_calm = all(m.in_force is not None and (m.seats or m.in_force.share == 0) for m in movers)
        return is_calm and min(m.age_s for m in movers) < self.cooldown_s

    def _menus(
        self, snapshot: Snapshot, movers: Sequence[Mover], outlooks: Sequence[Prospect], fleet: Fleet
    ) -> list[Menu]:
        alone_s = [_alone_s(mover, outlook) for mover, outlook in zip(movers, outlooks, strict=True)]
        typical_s = median_low([s for s in alone_s if s is not None] or [1.0])
        fair = len(fleet.devices) / len(movers)
        menus = []
        for mover, outlook, own_s in zip(movers, outlooks, alone_s, strict=True):
            short = (typical_s / max(1.0, own_s or typical_s)) ** self.short_first
            weight = mover.trial.weight * self._urgency(mover.trial) * 1000.0 ** min(2, max(0, mover.trial.priority))
            weight *= short if self.objective in {"throughput", "search"} else 1.0
            menus.append(self._menu(mover, outlook, fleet, (weight, fair, snapshot.now_s)))
        return menus

    def _menu(self, mover: Mover, outlook: Prospect, fleet: Fleet, terms: tuple[float, float, float]) -> Menu:
        weight, fair, now_s = terms
        base, now = reference(outlook), size_now(mover, fleet)
        spans_now = bool(mover.seats) and fleet.num_nodes(mover.seats) > 1
        move = max(0.05, 1 - mover.restart_s / self.horizon_s) if mover.seats else 1.0
        values = []
        for index, size in enumerate(outlook.sizes):
            stays = size == now
            rate = outlook.goodput(index, spans_nodes=stays and spans_now) or outlook.across[index]
            speedup = rate / base * (1.0 if stays else move)
            worth = weight * self._worth(mover.trial, speedup, fair, (speedup * base, now_s, outlook.is_prior))
            values.append(worth if rate > 0 else -math.inf)
            if mover.is_pinned:
                values[-1] = worth if stays else -math.inf
        sizes = outlook.sizes
        idle = -math.inf if mover.is_pinned and now in sizes else 0.0
        if self.objective == "fair" and idle == 0:
            idle = -weight / _FAIR_FLOOR**2
        units = tuple(max(1, round(size.devices * self._unit)) for size in sizes)
        return Menu(tuple(size.kind for size in sizes), units, tuple(values), idle)

    @property
    def _unit(self) -> int:
        return _PARTS if self.uses_fractions else 1

    def _worth(self, trial: TrialView, speedup: float, fair: float, terms: tuple[float, float, bool]) -> float:
        """What a speed-up over one device is worth under the objective."""
        rate, now_s, is_prior = terms
        if self.objective == "fair":
            return -1 / (speedup / max(fair, 1e-3) + _FAIR_FLOOR) ** 2
        if self.objective == "deadline" and trial.deadline_s is not None and not is_prior:
            needed = trial.remaining / max(1.0, trial.deadline_s - now_s)
            return 10.0 * min(1.0, rate / max(needed, 1e-9)) + 0.1 * speedup
        return speedup

    def _choose(
        self,
        snapshot: Snapshot,
        movers: Sequence[Mover],
        offers: tuple[Sequence[Menu], Sequence[Prospect]],
        fleet: Fleet,
    ) -> tuple[list[int], str]:
        """The option of every trial: a new division if it is worth it, else the present one with gaps filled."""
        menus, outlooks = offers
        held = [
            _only(menu, outlook.sizes, now) if (now := size_now(mover, fleet)) is not None else menu
            for mover, menu, outlook in zip(movers, menus, outlooks, strict=True)
        ]
        anew = self._solve(snapshot, movers, menus, fleet)
        same = self._solve(snapshot, movers, held, fleet)
        before, after = total(menus, same), total(menus, anew)
        if not math.isfinite(before) or after >= before + self.min_gain * abs(before) + 1e-12:
            gained = (after - before) / abs(before) if before and math.isfinite(before) else 0.0
            return anew, f"a new division gains {gained:.1%} of {self.objective}"
        gained = (after - before) / abs(before) if before else 0.0
        return same, f"a new division would gain {max(0.0, gained):.1%}, less than {self.min_gain:.1%}"

    def _solve(self, snapshot: Snapshot, movers: Sequence[Mover], menus: Sequence[Menu], fleet: Fleet) -> list[int]:
        capacities = [fleet.capacity(kind) * self._unit for kind in range(len(fleet.types))]
        work = sum(len(menu.values) for menu in menus) * sum(capacities)
        if len(capacities) == 1 and not snapshot.quotas and work <= _MAX_EXACT:
            return best_counts(menus, capacities[0])
        budget = Budget(snapshot)

        def allows(trial: int, units: int) -> bool:
            devices = units / self._unit
            if not budget.allows(movers[trial].trial, devices) and not movers[trial].is_pinned:
                return False
            budget.take(movers[trial].trial, devices)
            return True

        return climb_sizes(menus, capacities, allows)

    def _row(
        self, mover: Mover, outlook: Prospect, fleet: Fleet, given: Mapping[TrialId, Given], why: str
    ) -> Allocation:
        if mover.trial_id not in given:
            return wait(mover, f"waits: {len(given)} trials are worth more on {len(fleet.devices)} devices; {why}")
        seats, share = given[mover.trial_id]
        size = Size(fleet.type_of[seats[0]], len(seats), share)
        if mover.is_pinned or size not in outlook.sizes:
            return keep(mover, fleet, f"keeps its {len(mover.seats)} devices", "pinned")
        index, spans = outlook.sizes.index(size), fleet.num_nodes(seats) > 1
        rate, before = outlook.goodput(index, spans_nodes=spans), goodput_now(mover, outlook, fleet)
        dials = _calm(mover, with_share(outlook.dials(index, spans_nodes=spans), size))
        reason = f"{share * len(seats):g} devices, speed-up {rate / reference(outlook):.2f} over one; {why}"
        binding = "growth" if index == len(outlook.sizes) - 1 else "devices"
        row = run(mover, fleet, seats, dials, reason, binding=binding, predicted=None if outlook.is_prior else rate)
        gain = None if outlook.is_prior or not before else rate / before - 1
        return dataclasses.replace(row, predicted_gain=gain, alternatives=_alternatives(outlook, index))


def _alone_s(mover: Mover, outlook: Prospect) -> float | None:
    """Seconds that the rest of a trial would take on one device; None where no speed is known."""
    return None if outlook.is_prior else mover.trial.remaining / reference(outlook)


def _only(menu: Menu, sizes: Sequence[Size], now: Size) -> Menu:
    """The menu of a trial that keeps the size it has; the whole menu if that is none of its sizes."""
    if now not in sizes:
        return menu
    index = sizes.index(now)
    values = tuple(value if i == index else -math.inf for i, value in enumerate(menu.values))
    return dataclasses.replace(menu, values=values)


def _calm(mover: Mover, best: Settings) -> Settings:
    """The best dials, or those in force where the batch is near enough and nothing else differs."""
    old = mover.in_force
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
            dials = with_share(outlook.dials(index, spans_nodes=spans), outlook.sizes[index])
            found.append(Alternative(settings=dials, goodput=rate))
    return tuple(found)
