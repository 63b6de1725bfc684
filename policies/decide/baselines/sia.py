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

from orchestrator.policies.decide.baselines.fixed import with_fixed
from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, wait
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.goodput_table import GoodputTable, goodput_tables
from orchestrator.policies.decide.placing import realise, size_now, trimmed
from orchestrator.policies.decide.sizes import SearchSpace, Size
from orchestrator.policies.decide.sizing import NONE, Menu, climb_sizes
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.snapshot import Snapshot


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

    def _place(
        self, candidates: tuple[Candidate, ...], fleet: Fleet, budget: Budget, now_s: float
    ) -> Iterator[Allocation]:
        tables = goodput_tables(candidates, fleet, SearchSpace(pools=False, counts=_configurations(fleet)))
        menus = [self._menu(m, o, fleet, now_s) for m, o in zip(candidates, tables, strict=True)]
        capacities = [fleet.capacity(kind) for kind in range(len(fleet.types))]
        chosen = climb_sizes(menus, capacities)
        wanted: dict[TrialId, Size] = {
            candidate.trial_id: table.sizes[choice]
            for candidate, table, choice in zip(candidates, tables, chosen, strict=True)
            if choice != NONE
        }
        given = realise(candidates, wanted, fleet, budget)
        for candidate, table in zip(candidates, tables, strict=True):
            if candidate.trial_id not in given:
                yield wait(candidate, f"waits: {len(given)} trials have all {len(fleet.devices)} devices")
                continue
            if candidate.is_pinned:
                yield keep(candidate, fleet, f"keeps its {len(candidate.seats)} devices", "pinned")
                continue
            kind = fleet.type_of[given[candidate.trial_id][0][0]]
            fitting = trimmed(given[candidate.trial_id], kind, table.sizes)
            if fitting is None:
                yield wait(
                    candidate, f"waits: no configuration of it fits into {len(given[candidate.trial_id][0])} devices"
                )
                continue
            seats, share = fitting
            size = Size(kind, len(seats), share)
            index, spans = table.sizes.index(size), fleet.num_nodes(seats) > 1
            dials = table.dials(index, spans_nodes=spans)
            rate = table.goodput(index, spans_nodes=spans)
            reason = f"{len(seats)} devices of type {fleet.types[size.kind]!r} on {fleet.num_nodes(seats)} nodes"
            predicted = None if table.is_prior else rate
            yield run(candidate, fleet, seats, dials, reason, binding="goodput", predicted=predicted)

    def _menu(self, candidate: Candidate, table: GoodputTable, fleet: Fleet, now_s: float) -> Menu:
        age_s = now_s - candidate.trial.began_at_s
        factor = max(0.0, age_s - candidate.trial.num_restarts * candidate.restart_s) / (age_s + candidate.restart_s)
        now = size_now(candidate, fleet)
        rates = [_rate(table, index) for index in range(len(table.sizes))]
        least = min((rate for rate in rates if rate > 0), default=1.0)
        values = []
        for size, rate in zip(table.sizes, rates, strict=True):
            relative = rate / least * (1.0 if size == now or not candidate.seats else max(factor, 1e-3))
            worth = math.copysign(1.0, self.power) * max(relative, 1e-9) ** self.power
            values.append(worth if rate > 0 else -math.inf)
            if candidate.is_pinned:
                values[-1] = 0.0 if size == now else -math.inf
        sizes = table.sizes
        idle = -math.inf if candidate.is_pinned else -(1.0 + self.waiting)
        return Menu(tuple(s.kind for s in sizes), tuple(s.workers for s in sizes), tuple(values), idle)


def _rate(table: GoodputTable, index: int) -> float:
    return table.inside[index] or table.across[index]


def _configurations(fleet: Fleet) -> tuple[int, ...]:
    """Powers of two inside a node, whole nodes beyond."""
    counts: set[int] = set()
    for kind, node_size in enumerate(fleet.node_sizes):
        counts |= {2**power for power in range(node_size.bit_length()) if 2**power <= node_size}
        counts |= set(range(node_size, fleet.capacity(kind) + 1, max(1, node_size)))
    return tuple(sorted(counts))
