"""From sizes to devices: who keeps its seats, and where the others go.

Trials that keep their size keep their devices; the others are placed the largest first, and shrink until they fit.
Called by the policies that place trials; chooses no size itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from orchestrator.policies.decide.candidates import Budget, Candidate, split_batch, worker_range
from orchestrator.policies.decide.fleet import Fleet, Seats
from orchestrator.policies.decide.sizes import Size
from orchestrator.policies.plan import Settings, TrialId

Given = tuple[Seats, float]
"""Devices and the share of each."""


def size_now(candidate: Candidate, fleet: Fleet) -> Size | None:
    """What it has, None where it holds nothing."""
    if not candidate.seats:
        return None
    return Size(fleet.type_of[candidate.seats[0]], len(candidate.seats), candidate.share)


def realise(
    candidates: Sequence[Candidate],
    wanted: Mapping[TrialId, Size],
    fleet: Fleet,
    budget: Budget,
    *,
    one_spread_per_node: bool = False,
    shrinks: bool = True,
) -> dict[TrialId, Given]:
    """Devices for everyone who is to have some; pinned trials keep theirs whatever is wanted.

    Args:
        candidates: all movable trials.
        wanted: the size of those that shall run.
        fleet: taken from.
        budget: charged.
        one_spread_per_node: whether a node may hold ranks of one trial only that spans several nodes.
        shrinks: whether a trial gets fewer ranks than wanted where they do not fit.
    """
    given: dict[TrialId, Given] = {}
    rest: list[tuple[Candidate, Size]] = []
    crowded: set[int] = set()
    for candidate in sorted(candidates, key=lambda m: not m.is_pinned):
        size, now = wanted.get(candidate.trial_id), size_now(candidate, fleet)
        stays = candidate.is_pinned or (size is not None and size == now)
        if (
            stays
            and fleet.holds(candidate.seats, candidate.share)
            and (candidate.is_pinned or budget.allows(candidate.trial, candidate.share * len(candidate.seats)))
        ):
            _take(candidate, (candidate.seats, candidate.share), fleet, budget, given)
            if fleet.num_nodes(candidate.seats) > 1:
                crowded.update(fleet.node_of[seat] for seat in candidate.seats)
        elif size is not None:
            rest.append((candidate, size))
    for candidate, size in sorted(rest, key=lambda pair: (-pair[1].devices, pair[0].trial_id)):
        avoid = frozenset(crowded) if one_spread_per_node else frozenset[int]()
        fewest = worker_range(candidate.trial)[0] if shrinks else size.workers
        seats = _find(candidate, size, fleet, budget, (fewest, avoid))
        if seats is not None:
            _take(candidate, (seats, size.share), fleet, budget, given)
            if fleet.num_nodes(seats) > 1:
                crowded.update(fleet.node_of[seat] for seat in seats)
    return given


def trimmed(given: Given, kind: int, sizes: Sequence[Size]) -> Given | None:
    """The most of what was given that is one of the sizes; None where nothing is.

    `realise` shrinks one rank at a time and so may end between two sizes.
    """
    seats, share = given
    fitting = [s.workers for s in sizes if (s.kind, s.share) == (kind, share) and s.workers <= len(seats)]
    return (seats[: max(fitting)], share) if fitting else None


def _find(
    candidate: Candidate, size: Size, fleet: Fleet, budget: Budget, terms: tuple[int, frozenset[int]]
) -> Seats | None:
    fewest, avoid = terms
    for workers in range(size.workers, fewest - 1, -1):
        if budget.allows(candidate.trial, workers * size.share):
            seats = fleet.find(size.kind, workers, size.share, avoid=avoid)
            if seats is not None:
                return seats
    return None


def _take(candidate: Candidate, given: Given, fleet: Fleet, budget: Budget, table: dict[TrialId, Given]) -> None:
    seats, share = given
    fleet.take(seats, share)
    budget.take(candidate.trial, share * len(seats))
    table[candidate.trial_id] = given


def in_order(order: Sequence[Candidate], fleet: Fleet, budget: Budget, *, blocks: bool) -> dict[TrialId, Size]:
    """Who runs if devices are counted out in this order, each trial the whole devices its user asked for.

    Args:
        order: the trials, the first served first.
        fleet: what there is; nothing is taken.
        budget: quotas; left as they were.
        blocks: whether those behind one that does not fit have to wait for it.
    """
    left = [fleet.num_idle(kind) for kind in range(len(fleet.types))]
    runs: dict[TrialId, Size] = {}
    charged: list[tuple[Candidate, int]] = []
    for candidate in order:
        workers = candidate.wish.num_workers
        now = size_now(candidate, fleet)
        if now is not None and now.workers == workers and now.share == 1:
            kinds = [now.kind]
        else:
            kinds = sorted(range(len(left)), key=lambda kind: (-left[kind], kind))
        kind = next((kind for kind in kinds if left[kind] >= workers), None)
        if not budget.allows(candidate.trial, workers):
            continue
        if kind is None:
            if blocks:
                break
            continue
        left[kind] -= workers
        budget.take(candidate.trial, workers)
        charged.append((candidate, workers))
        runs[candidate.trial_id] = Size(kind, workers, 1.0)
    for candidate, workers in charged:
        budget.take(candidate.trial, -workers)
    return runs


def as_wished(candidate: Candidate, workers: int) -> Settings:
    """The dials its user asked for, on that many ranks; what is in force where that is the same batch."""
    wish, old = candidate.wish, candidate.in_force
    tier = wish.tier if wish.tier not in candidate.trial.fit.banned_tiers else candidate.trial.limits.tiers[0]
    micro_batch, grad_accum = split_batch(candidate.trial, wish.global_batch, workers)
    if old is not None and old.num_workers == workers and old.share > 0:
        if old.tier in candidate.trial.limits.tiers:
            tier = old.tier
        if old.global_batch == micro_batch * grad_accum * workers:
            micro_batch, grad_accum = old.micro_batch, old.grad_accum
    return dataclasses.replace(
        wish, share=1.0, micro_batch=micro_batch, grad_accum=grad_accum, tier=tier, num_workers=workers
    )
