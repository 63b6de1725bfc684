"""Dividing devices among trials: fair filling, and climbing from a floor by marginal utility.

Works on claims alone; what a share is worth is a function that the caller passes in. Called by the policies.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.policies.plan import DeviceId, TrialId

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one trial may get: the same share for each of its ranks, between two bounds."""

    trial_id: TrialId
    weight: float
    min_share: float
    max_share: float
    placement: tuple[DeviceId, ...]


def fits(claims: Iterable[Claim], shares: Mapping[TrialId, float]) -> bool:
    """Whether no device is over-committed by `shares`."""
    return all(load <= 1 + _EPSILON for load in _load(claims, shares).values())


def components(claims: Sequence[Claim]) -> tuple[tuple[Claim, ...], ...]:
    """Groups of claims that share devices, directly or through others; each can be divided by itself."""
    root: dict[DeviceId, DeviceId] = {}

    def find(device_id: DeviceId) -> DeviceId:
        while root.setdefault(device_id, device_id) != device_id:
            root[device_id] = root[root[device_id]]
            device_id = root[device_id]
        return device_id

    for claim in claims:
        first = find(claim.placement[0])
        for device_id in claim.placement[1:]:
            root[find(device_id)] = first
    groups: dict[DeviceId, list[Claim]] = defaultdict(list)
    for claim in sorted(claims, key=lambda c: c.trial_id):
        groups[find(claim.placement[0])].append(claim)
    return tuple(tuple(group) for group in groups.values())


def fill(claims: Sequence[Claim]) -> dict[TrialId, float]:
    """Weighted max-min fair shares: everyone rises in proportion to weight until a bound or a full device stops it.

    Where the minima alone exceed a device, its trials get their minima: the caller must have made room before.

    >>> a, b = (Claim(trial_id=TrialId(i), weight=1.0, min_share=0.1, max_share=m, placement=(DeviceId("d"),))
    ...         for i, m in (("a", 1.0), ("b", 0.3)))
    >>> fill([a, b])
    {'a': 0.7, 'b': 0.3}
    """
    open_on: dict[DeviceId, dict[TrialId, tuple[Claim, int]]] = defaultdict(dict)
    for claim in sorted(claims, key=lambda c: c.trial_id):
        for device_id, num_ranks in Counter(claim.placement).items():
            open_on[device_id][claim.trial_id] = (claim, num_ranks)
    taken: dict[DeviceId, float] = dict.fromkeys(open_on, 0.0)
    shares: dict[TrialId, float] = {}
    heap = [(_full_level(0.0, rows.values()), device_id) for device_id, rows in open_on.items()]
    heapq.heapify(heap)
    while heap:
        level, device_id = heapq.heappop(heap)
        now = _full_level(taken[device_id], open_on[device_id].values())
        if now > level * (1 + _EPSILON):  # others on it were stopped elsewhere since: it fills later
            heapq.heappush(heap, (now, device_id))
            continue
        for claim, _ in list(open_on[device_id].values()):
            share = _clamp(claim.weight * now, claim)
            shares[claim.trial_id] = share
            for other, num_ranks in Counter(claim.placement).items():
                taken[other] += share * num_ranks
                del open_on[other][claim.trial_id]
    return {claim.trial_id: _tidy(shares[claim.trial_id], claim) for claim in sorted(claims, key=lambda c: c.trial_id)}


def climb(
    claims: Sequence[Claim],
    floor: Mapping[TrialId, float],
    utility: Callable[[TrialId, float], float],
    quantum: float,
) -> dict[TrialId, float]:
    """Raise shares from `floor` step by step, always where weight times utility grows most per device fraction.

    What would do harm is given to nobody.

    Best possible on the grid of `quantum` where utilities are concave and ranks lie on one device. Ties go to the
    trial with the smallest share for its weight, then by id, so that equals end as equals.
    """
    left = {device_id: 1 - load for device_id, load in _load(claims, floor).items()}
    shares = {claim.trial_id: floor[claim.trial_id] for claim in claims}
    heap: list[tuple[float, float, TrialId, float]] = []
    by_id = {claim.trial_id: claim for claim in claims}

    def offer(claim: Claim) -> None:
        share = shares[claim.trial_id]
        # The next point of the grid; a share that lies on it up to rounding goes on to the one after.
        target = min(claim.max_share, quantum * (math.floor(share / quantum + 1e-6) + 1))
        if target <= share + _EPSILON:
            return
        gained = claim.weight * (utility(claim.trial_id, target) - utility(claim.trial_id, share))
        if gained < 0:
            return  # more of it does harm
        worth = gained / ((target - share) * len(claim.placement))
        heapq.heappush(heap, (-float(f"{worth:.9g}"), share / claim.weight, claim.trial_id, target))

    for claim in claims:
        offer(claim)
    while heap:
        _, _, trial_id, target = heapq.heappop(heap)
        claim = by_id[trial_id]
        step = target - shares[trial_id]
        needs = {device_id: step * num_ranks for device_id, num_ranks in Counter(claim.placement).items()}
        if any(need > left[device_id] + _EPSILON / 10 for device_id, need in needs.items()):
            continue  # its device is full; it never empties again, so the trial is done
        for device_id, need in needs.items():
            left[device_id] -= need
        shares[trial_id] = target
        offer(claim)
    return shares


def _full_level(taken: float, rows: Iterable[tuple[Claim, int]]) -> float:
    """The level at which the open claims fill what is left of a device; infinity if their maxima leave room."""
    events: list[tuple[float, float]] = []
    load = taken
    for claim, num_ranks in rows:
        load += num_ranks * claim.min_share
        events.append((claim.min_share / claim.weight, num_ranks * claim.weight))
        events.append((claim.max_share / claim.weight, -num_ranks * claim.weight))
    level, slope = 0.0, 0.0
    for at, change in sorted(events):
        if slope > _EPSILON and load + slope * (at - level) >= 1:
            return level + max(0.0, 1 - load) / slope
        load += slope * (at - level)
        level, slope = at, slope + change
        if load > 1 + _EPSILON:
            return 0.0
    return math.inf


def _clamp(share: float, claim: Claim) -> float:
    return min(claim.max_share, max(claim.min_share, share))


def _tidy(share: float, claim: Claim) -> float:
    """The share rounded down to a millionth, so that plans read well; never below the claim's minimum."""
    return _clamp(math.floor(share * 1e6 + 1e-6) / 1e6, claim)


def _load(claims: Iterable[Claim], shares: Mapping[TrialId, float]) -> dict[DeviceId, float]:
    load: dict[DeviceId, float] = defaultdict(float)
    for claim in claims:
        for device_id in claim.placement:
            load[device_id] += shares[claim.trial_id]
    return dict(load)
