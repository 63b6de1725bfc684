"""Optimus: devices one by one to whom they save the most time.

The batch is what the user asked for. Every trial gets one device while there are some; each further one goes where it
shortens the remaining time most, by the fitted step time and the iterations still to do.

Source: Peng et al., Optimus (EuroSys 2018), section 4.1 (marginal gain), for all-reduce as in the evaluation of
Pollux (OSDI 2021, section 5.1). There step times and remaining iterations are given by an oracle; here they are what
was fitted, so far as it was, and what is expected where a length is unknown.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.policies.decide.baselines.fixed import with_fixed
from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, wait, worker_range
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.goodput_table import GoodputTable, goodput_tables
from orchestrator.policies.decide.placing import as_wished, realise
from orchestrator.policies.decide.sizes import SearchSpace, Size
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimus:
    """Marginal gain in remaining time, batch as asked.

    Attributes:
        max_workers: most devices for one trial.
    """

    max_workers: int = 64

    def __post_init__(self) -> None:
        if self.max_workers < 1:
            raise ValueError(f"max_workers={self.max_workers!r}; allowed: 1 or more")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan that hands out devices by marginal gain."""
        return make_plan(snapshot, "optimus", with_fixed(snapshot, lambda m, f, b: _place(m, f, b, self.max_workers)))


def _place(candidates: tuple[Candidate, ...], fleet: Fleet, budget: Budget, max_workers: int) -> Iterator[Allocation]:
    space = SearchSpace(tunes_batch=False, growth=10**6, counts=tuple(range(1, max_workers + 1)))
    tables = goodput_tables(candidates, fleet, space)
    wanted = _hand_out(candidates, tables, fleet)
    given = realise(candidates, wanted, fleet, budget)
    for candidate, table in zip(candidates, tables, strict=True):
        if candidate.trial_id not in given:
            yield wait(candidate, f"waits: none of {len(fleet.devices)} devices is left after one for each before it")
        elif candidate.is_pinned:
            yield keep(candidate, fleet, f"keeps its {len(candidate.seats)} devices", "pinned")
        else:
            seats, _ = given[candidate.trial_id]
            left_s = _time_left_s(candidate, table, fleet.type_of[seats[0]], len(seats))
            reason = f"{len(seats)} devices by marginal gain, about {left_s:.0f} s left"
            yield run(candidate, fleet, seats, as_wished(candidate, len(seats)), reason, binding="marginal gain")


def _hand_out(candidates: Sequence[Candidate], tables: Sequence[GoodputTable], fleet: Fleet) -> dict[TrialId, Size]:
    left = [fleet.capacity(kind) for kind in range(len(fleet.types))]
    counts: dict[int, tuple[int, int]] = {}
    for position, candidate in enumerate(candidates):
        if candidate.is_pinned:
            counts[position] = (fleet.type_of[candidate.seats[0]], len(candidate.seats))
            left[counts[position][0]] -= len(candidate.seats)
    heap: list[tuple[float, float, TrialId, int]] = []

    def offer(position: int) -> None:
        kind, workers = counts[position]
        now_s, next_s = (_time_left_s(candidates[position], tables[position], kind, n) for n in (workers, workers + 1))
        if next_s < now_s:
            heapq.heappush(
                heap, (next_s - now_s, candidates[position].trial.began_at_s, candidates[position].trial_id, position)
            )

    order = sorted(
        range(len(candidates)), key=lambda i: (-candidates[i].trial.priority, candidates[i].trial.began_at_s, i)
    )
    for position in order:
        if position in counts:
            continue
        fewest = max(1, worker_range(candidates[position].trial)[0])
        kinds = sorted(range(len(left)), key=lambda kind: (-left[kind], kind))
        if kinds and left[kinds[0]] >= fewest:
            counts[position] = (kinds[0], fewest)
            left[kinds[0]] -= fewest
            offer(position)
    while heap:
        _, _, _, position = heapq.heappop(heap)
        kind, workers = counts[position]
        if left[kind] < 1:
            continue
        left[kind] -= 1
        counts[position] = (kind, workers + 1)
        offer(position)
    return {candidates[i].trial_id: Size(kind, workers, 1.0) for i, (kind, workers) in counts.items()}


def _time_left_s(candidate: Candidate, table: GoodputTable, kind: int, workers: int) -> float:
    """Remaining work over goodput at the batch asked for; infinite where that size is not allowed."""
    size = Size(kind, workers, 1.0)
    try:
        index = table.sizes.index(size)
    except ValueError:
        return float("inf")
    rate = table.inside[index] or table.across[index]
    return max(1.0, candidate.trial.expected_remaining) / rate if rate > 0 else float("inf")
