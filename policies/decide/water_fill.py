"""Water-filling of movable trials: equal levels by weight, in fractions where there are more trials than devices.

Called by `fluid` and `fair_share`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, wait, worker_range
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.placing import as_wished, realise
from orchestrator.policies.decide.sizes import Size
from orchestrator.policies.plan import Allocation, Settings, TrialId

MAX_PER_DEVICE = 8
"""Trials on one device at most, where nobody says otherwise."""


def water_fill(
    candidates: tuple[Candidate, ...], fleet: Fleet, budget: Budget, max_per_device: int
) -> Iterator[Allocation]:
    """Rows at the water level; `max_per_device` trials share a device at most."""
    sizes: dict[TrialId, Size] = {}
    for kind, members in _by_kind(candidates, fleet).items():
        sizes |= _level(members, kind, fleet, max_per_device)
    given = realise(candidates, sizes, fleet, budget)
    level = len(fleet.devices) / max(1, len(candidates))
    for candidate in candidates:
        if candidate.trial_id not in given:
            yield wait(candidate, f"waits: {len(candidates)} trials, {len(fleet.devices)} devices, level {level:.3f}")
        elif candidate.is_pinned:
            yield keep(candidate, fleet, f"keeps {candidate.share * len(candidate.seats):.3f} devices", "pinned")
        else:
            seats, share = given[candidate.trial_id]
            reason = f"{share * len(seats):.3f} devices at the water level of {level:.3f}"
            yield run(candidate, fleet, seats, _dials(candidate, len(seats), share), reason, binding="water level")


def _dials(candidate: Candidate, workers: int, share: float) -> Settings:
    wished = as_wished(candidate, workers)
    return Settings(
        share=share,
        micro_batch=wished.micro_batch,
        grad_accum=wished.grad_accum,
        tier=wished.tier,
        num_workers=workers,
    )


def _by_kind(candidates: Sequence[Candidate], fleet: Fleet) -> dict[int, list[Candidate]]:
    members: dict[int, list[Candidate]] = {kind: [] for kind in range(len(fleet.types))}
    if not members:
        return members
    for candidate in sorted(candidates, key=lambda m: (not m.seats, -m.trial.priority, m.trial.began_at_s, m.trial_id)):
        if candidate.seats:
            members[fleet.type_of[candidate.seats[0]]].append(candidate)
        else:
            members[max(members, key=lambda k: (fleet.capacity(k) / (1 + len(members[k])), -k))].append(candidate)
    return members


def _level(members: Sequence[Candidate], kind: int, fleet: Fleet, max_per_device: int) -> dict[TrialId, Size]:
    """The size of every trial on one type of device."""
    sizes: dict[TrialId, Size] = {}
    # Who must keep whole devices is not part of it; who must keep a fraction counts as one of those that get one.
    open_to = sorted((m for m in members if not m.is_pinned or m.share < 1), key=_order)
    left = fleet.capacity(kind) - sum(len(m.seats) for m in members if m.is_pinned and m.share == 1)
    if len(open_to) > left > 0:
        finest = min(max_per_device, *(_finest(m) for m in open_to))
        parts = min(finest, math.ceil(len(open_to) / left))
        if parts > 1:
            return _fractions(open_to, kind, left, parts)
    counts = {m.trial_id: 0 for m in open_to}
    while left > 0:
        # The lowest level by weight rises next; equal ones in the order in which they came.
        able = [m for m in open_to if counts[m.trial_id] < worker_range(m.trial)[1] and _step(m, counts) <= left]
        if not able:
            break
        lowest = min(able, key=lambda m: (counts[m.trial_id] / m.trial.weight, *_order(m)))
        left -= _step(lowest, counts)
        counts[lowest.trial_id] += _step(lowest, counts)
    for candidate in open_to:
        if counts[candidate.trial_id]:
            sizes[candidate.trial_id] = Size(kind, counts[candidate.trial_id], 1.0)
    return sizes


def _order(candidate: Candidate) -> tuple[int, float, str]:
    return (-candidate.trial.priority, candidate.trial.began_at_s, candidate.trial_id)


def _step(candidate: Candidate, counts: dict[TrialId, int]) -> int:
    return 1 if counts[candidate.trial_id] else worker_range(candidate.trial)[0]


def _fractions(open_to: Sequence[Candidate], kind: int, devices: int, parts: int) -> dict[TrialId, Size]:
    """Equal parts of a device for all that fit, whole ones for the first as far as devices are left."""
    served = open_to[: parts * devices]
    num_whole = (parts * devices - len(served)) // (parts - 1)
    return {
        candidate.trial_id: Size(kind, 1, candidate.trial.limits.max_share if position < num_whole else 1 / parts)
        for position, candidate in enumerate(served)
    }


def _finest(candidate: Candidate) -> int:
    """How many trials like it fit on one device."""
    if worker_range(candidate.trial)[0] > 1:
        return 1
    return max(1, math.floor(1 / candidate.trial.limits.min_share + 1e-9))
