"""Sia: device type and count together, by goodput relative to the least a trial could have.

A trial's configurations are powers of two inside a node and whole nodes beyond, on each type of device. Each counts as
its goodput over the smallest of the trial, scaled down by what a restart costs; a trial grows at most twofold. The
configurations are chosen greedily by what they add per device.

Source: Jayaram Subramanya et al., Sia (SOSP 2023), sections 3.2 to 3.4 (p = -0.5, lambda = 1.1). Unlike there, the
integer program is solved greedily, type by type of device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.policies.fixed import with_fixed
from orchestrator.policies.fleet import Fleet
from orchestrator.policies.movable import Budget, Mover, keep, run, wait
from orchestrator.policies.placing import realise, size_now, trimmed
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.prospects import Ask, Prospect, Size, prospects
from orchestrator.policies.sizing import NONE, Menu, climb_sizes
from orchestrator.policies.snapshot import Snapshot
from orchestrator.policies.world import make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Sia:
    """Goodput by type of device.

    Attributes:
        power: exponent p of the objective; negative means fairness first.
        waiting: what it costs to leave a trial without devices (lambda).
    """

    power: float = -0.5
    waiting: float = 1.1

    def __post_init__(self) -> None:
        if not -10 <= self.power <= 1 or self.power == 0:
            raise ValueError(f"power={self.power!r}; allowed: -10 to 1 and not 0, such as -0.5")
        if not self.waiting > 0:
            raise ValueError(f"waiting={self.waiting!r}; allowed: above 0, such as 1.1")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan that chooses configurations by goodput."""
        return make_plan(snapshot, "sia", with_fixed(snapshot, lambda m, f, b: self._place(m, f, b, snapshot.now_s)))

    def _place(self, movers: tuple[Mover, ...], fleet: Fleet, budget: Budget, now_s: float) -> Iterator[Allocation]:
        outlooks = prospects(movers, fleet, Ask(pools=False, counts=_configurations(fleet)))
        menus = [self._menu(m, o, fleet, now_s) for m, o in zip(movers, outlooks, strict=True)]
        capacities = [fleet.capacity(kind) for kind in range(len(fleet.types))]
        chosen = climb_sizes(menus, capacities)
        wanted: dict[TrialId, Size] = {
            mover.trial_id: outlook.sizes[choice]
            for mover, outlook, choice in zip(movers, outlooks, chosen, strict=True)
            if choice != NONE
        }
        given = realise(movers, wanted, fleet, budget)
        for mover, outlook in zip(movers, outlooks, strict=True):
            if mover.trial_id not in given:
                yield wait(mover, f"waits: {len(given)} trials have all {len(fleet.devices)} devices")
                continue
            if mover.is_pinned:
                yield keep(mover, fleet, f"keeps its {len(mover.seats)} devices", "pinned")
                continue
            kind = fleet.type_of[given[mover.trial_id][0][0]]
            fitting = trimmed(given[mover.trial_id], kind, outlook.sizes)
            if fitting is None:
                yield wait(mover, f"waits: no configuration of it fits into {len(given[mover.trial_id][0])} devices")
                continue
            seats, share = fitting
            size = Size(kind, len(seats), share)
            index, spans = outlook.sizes.index(size), fleet.num_nodes(seats) > 1
            dials = outlook.dials(index, spans_nodes=spans)
            rate = outlook.goodput(index, spans_nodes=spans)
            reason = f"{len(seats)} devices of type {fleet.types[size.kind]!r} on {fleet.num_nodes(seats)} nodes"
            predicted = None if outlook.is_prior else rate
            yield run(mover, fleet, seats, dials, reason, binding="goodput", predicted=predicted)

    def _menu(self, mover: Mover, outlook: Prospect, fleet: Fleet, now_s: float) -> Menu:
        age_s = now_s - mover.trial.began_at_s
        factor = max(0.0, age_s - mover.trial.num_restarts * mover.restart_s) / (age_s + mover.restart_s)
        now = size_now(mover, fleet)
        rates = [_rate(outlook, index) for index in range(len(outlook.sizes))]
        least = min((rate for rate in rates if rate > 0), default=1.0)
        values = []
        for size, rate in zip(outlook.sizes, rates, strict=True):
            relative = rate / least * (1.0 if size == now or not mover.seats else max(factor, 1e-3))
            worth = math.copysign(1.0, self.power) * max(relative, 1e-9) ** self.power
            values.append(worth if rate > 0 else -math.inf)
            if mover.is_pinned:
                values[-1] = 0.0 if size == now else -math.inf
        sizes = outlook.sizes
        idle = -math.inf if mover.is_pinned else -(1.0 + self.waiting)
        return Menu(tuple(s.kind for s in sizes), tuple(s.workers for s in sizes), tuple(values), idle)


def _rate(outlook: Prospect, index: int) -> float:
    return outlook.inside[index] or outlook.across[index]


def _configurations(fleet: Fleet) -> tuple[int, ...]:
    """Powers of two inside a node, whole nodes beyond."""
    counts: set[int] = set()
    for kind, node_size in enumerate(fleet.node_sizes):
        counts |= {2**power for power in range(node_size.bit_length()) if 2**power <= node_size}
        counts |= set(range(node_size, fleet.capacity(kind) + 1, max(1, node_size)))
    return tuple(sorted(counts))
