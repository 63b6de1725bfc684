"""Pollux: whole devices by goodput relative to a fair share, batch tuned to the devices.

Maximises the power mean (p = -1) of the trials' speed-ups over their fair share, each scaled down by what it has lost
to restarts if its devices would change. At most one trial that spans nodes is on any node, and a trial may have at most
twice the devices it ever had. The batch is the one of the best goodput.

Source: Qiao et al., Pollux (OSDI 2021), section 4.2, equations 8 to 11, with the constants of its published simulator
(p = -1, restarts of 30 s). Unlike there, device counts are found by dynamic programming instead of a genetic search,
which can only help it, and trials of one shape share what was measured of their speed, though not the limit of twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.policies.decide.baselines.fixed import with_fixed
from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, wait
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.goodput_table import GoodputTable, goodput_tables
from orchestrator.policies.decide.placing import Given, realise, size_now
from orchestrator.policies.decide.sizes import SearchSpace, Size
from orchestrator.policies.decide.sizing import NONE, Menu, best_counts
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.snapshot import Snapshot

_SPACE = SearchSpace(pools=False, counts=tuple(range(1, 65)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pollux:
    """Goodput with whole devices.

    Attributes:
        power: exponent of the mean; more negative is more fair.
        min_speedup: what is added to every speed-up, so that a waiting trial's is not zero.
    """

    power: float = -1.0
    min_speedup: float = 1e-3

    def __post_init__(self) -> None:
        if not self.power < 0:
            raise ValueError(f"power={self.power!r}; allowed: below 0, such as -1")
        if not self.min_speedup > 0:
            raise ValueError(f"min_speedup={self.min_speedup!r}; allowed: above 0, such as 0.001")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan with the best mean speed-up."""
        return make_plan(snapshot, "pollux", with_fixed(snapshot, lambda m, f, b: self._place(m, f, b, snapshot.now_s)))

    def _place(
        self, candidates: tuple[Candidate, ...], fleet: Fleet, budget: Budget, now_s: float
    ) -> Iterator[Allocation]:
        tables = goodput_tables(candidates, fleet, _SPACE)
        wanted = self._sizes(candidates, tables, fleet, now_s)
        given = realise(candidates, wanted, fleet, budget, one_spread_per_node=True)
        for candidate, table in zip(candidates, tables, strict=True):
            if candidate.trial_id not in given:
                yield wait(
                    candidate, f"waits: {len(given)} trials on {len(fleet.devices)} devices have a better mean speed-up"
                )
            elif table.is_prior and candidate.seats and given[candidate.trial_id][0] == candidate.seats:
                yield keep(candidate, fleet, f"keeps its {len(candidate.seats)} devices until measured", "unmeasured")
            else:
                yield _row(candidate, table, fleet, given[candidate.trial_id], len(candidates))

    def _sizes(
        self, candidates: Sequence[Candidate], tables: Sequence[GoodputTable], fleet: Fleet, now_s: float
    ) -> dict[TrialId, Size]:
        """The size of every trial that runs. Pollux knows no device types: each trial has one, in turn."""
        wanted: dict[TrialId, Size] = {}
        for kind, members in _by_kind(candidates, fleet).items():
            capacity = fleet.capacity(kind)
            fair = math.ceil(capacity / max(1, len(members)))
            sizes = [_of_kind(tables[i], kind) for i in members]
            menus = [
                self._menu(candidates[i], tables[i], indices, fleet, (fair, now_s))
                for i, indices in zip(members, sizes, strict=True)
            ]
            for i, indices, choice in zip(members, sizes, best_counts(menus, capacity), strict=True):
                if choice != NONE:
                    wanted[candidates[i].trial_id] = tables[i].sizes[indices[choice]]
        return wanted

    def _menu(
        self, candidate: Candidate, table: GoodputTable, indices: Sequence[int], fleet: Fleet, terms: tuple[int, float]
    ) -> Menu:
        fair, now_s = terms
        base = _fair_goodput(table, indices, fair)
        age_s = now_s - candidate.trial.began_at_s
        factor = max(0.0, age_s - candidate.trial.num_restarts * candidate.restart_s) / (age_s + candidate.restart_s)
        now = size_now(candidate, fleet)
        values = []
        for index in indices:
            size = table.sizes[index]
            stays = size == now
            spans = stays and fleet.num_nodes(candidate.seats) > 1
            rate = table.goodput(index, spans_nodes=spans) or table.across[index]
            speedup = rate / base * (1.0 if stays else factor) / max(1, fleet.node_sizes[size.kind])
            values.append(-((speedup + self.min_speedup) ** self.power))
            if candidate.is_pinned:
                values[-1] = 0.0 if stays else -math.inf
        workers = tuple(table.sizes[index].workers for index in indices)
        idle = -math.inf if candidate.is_pinned and now is not None else -(self.min_speedup**self.power)
        return Menu((0,) * len(indices), workers, tuple(values), idle)


def _of_kind(table: GoodputTable, kind: int) -> list[int]:
    return [index for index, size in enumerate(table.sizes) if size.kind == kind]


def _fair_goodput(table: GoodputTable, indices: Sequence[int], fair: int) -> float:
    """Goodput of a fair share: the largest size up to it, or the smallest there is."""
    fitting = [i for i in indices if table.sizes[i].workers <= fair] or list(indices[:1])
    rates = [table.inside[i] or table.across[i] for i in fitting]
    if not rates or not rates[-1] > 0:
        return 1.0
    # Sizes end where the trial may not grow yet; beyond that a fair share is taken as linear.
    return rates[-1] * max(1.0, fair / table.sizes[fitting[-1]].workers)


def _by_kind(candidates: Sequence[Candidate], fleet: Fleet) -> dict[int, list[int]]:
    """Trials by the type of device they are tied to: that on which they run, else the one with most room for each."""
    members: dict[int, list[int]] = {kind: [] for kind in range(len(fleet.types))}
    waiting = []
    for position, candidate in enumerate(candidates):
        if candidate.seats:
            members[fleet.type_of[candidate.seats[0]]].append(position)
        else:
            waiting.append(position)
    for position in waiting if members else ():
        kind = max(members, key=lambda k: (fleet.capacity(k) / (1 + len(members[k])), -k))
        members[kind].append(position)
    return {kind: sorted(positions) for kind, positions in members.items()}


def _row(candidate: Candidate, table: GoodputTable, fleet: Fleet, given: Given, num_trials: int) -> Allocation:
    seats, share = given
    size = Size(fleet.type_of[seats[0]], len(seats), share)
    index = table.sizes.index(size) if size in table.sizes else None
    if index is None or candidate.is_pinned:
        return keep(candidate, fleet, f"keeps its {len(candidate.seats)} devices", "pinned")
    spans = fleet.num_nodes(seats) > 1
    dials = table.dials(index, spans_nodes=spans)
    rate = table.goodput(index, spans_nodes=spans)
    reason = f"{len(seats)} devices on {fleet.num_nodes(seats)} nodes among {num_trials} trials"
    predicted = None if table.is_prior else rate
    return run(candidate, fleet, seats, dials, reason, binding="mean speed-up", predicted=predicted)
