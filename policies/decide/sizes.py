"""The sizes that a trial may be given: numbers of whole devices of one type, or a fraction of one.

They follow from the limits of the trial and from the ranks on which its shape was measured. Called by
`policies.decide.goodput_table` and `policies.decide.worth`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.policies.decide.candidates import Candidate, worker_range
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.learn.fit import TrialFit

_EVERY_COUNT_UP_TO = 8
"""Numbers of ranks up to this are all considered, half octaves above."""


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """What a trial may be given: whole devices of one type, or a fraction of one."""

    kind: int
    workers: int
    share: float

    @property
    def devices(self) -> float:
        """How much of the fleet it takes."""
        return self.workers * self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The sizes and batches among which a policy looks.

    Attributes:
        fractions: shares of one device that may be given to one rank.
        tunes_batch: whether the batch may change; otherwise it is the one its user asked for.
        growth: ranks are limited to this many times the most that were measured.
        pools: whether that counts what other trials of the shape measured.
        counts: the numbers of ranks to consider, or None for all small and some large ones.
    """

    fractions: tuple[float, ...] = ()
    tunes_batch: bool = True
    growth: int = 2
    pools: bool = True
    counts: tuple[int, ...] | None = None


def most_workers(fit: TrialFit) -> int:
    """The most ranks that one trial was measured on."""
    if fit.known_speed is not None:
        return fit.known_speed.max_workers
    return max((cell.num_workers for cell in fit.cells), default=0)


def usual_counts(fleet: Fleet, candidates: Iterable[Candidate]) -> frozenset[int]:
    """Numbers of ranks worth choosing: all small ones, then halves of octaves, and those of today."""
    most = max((fleet.capacity(kind) for kind in range(len(fleet.types))), default=0)
    counts = set(range(1, min(most, _EVERY_COUNT_UP_TO) + 1))
    step = _EVERY_COUNT_UP_TO
    while step <= most:
        counts |= {step, step + step // 2}
        step *= 2
    for candidate in candidates:
        counts |= {len(candidate.seats), candidate.wish.num_workers}
    return frozenset(count for count in counts if 1 <= count <= most)


def counts_of(fleet: Fleet, space: SearchSpace, candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """The usual numbers of ranks, and what a large trial may keep if it gives up devices of which not all are taken."""
    if space.counts is not None:
        return space.counts
    usual = usual_counts(fleet, candidates)
    least = sum(worker_range(candidate.trial)[0] for candidate in candidates if not candidate.seats)
    held = {len(candidate.seats) for candidate in candidates}
    kept = {count - times * least for count in held for times in (1, 2)} if least else set()
    return tuple(sorted(usual | {count for count in kept if count > _EVERY_COUNT_UP_TO}))


def sizes_of(
    candidate: Candidate, fleet: Fleet, space: SearchSpace, max_workers: int, counts: Sequence[int]
) -> tuple[Size, ...]:
    """The sizes that one trial may be given, sorted; `max_workers` is the most ranks that its shape was measured on."""
    trial = candidate.trial
    low, high = worker_range(trial)
    known = max_workers if space.pools else most_workers(trial.fit)
    high = max(low, min(high, max(1, space.growth * known)))
    limits = trial.limits
    sizes = []
    for kind in range(len(fleet.types)):
        if low == 1:
            sizes += [Size(kind, 1, s) for s in space.fractions if limits.min_share - 1e-9 <= s < limits.max_share]
        if limits.max_share >= 1:
            sizes += [Size(kind, n, 1.0) for n in counts if low <= n <= high and n <= fleet.capacity(kind)]
    return tuple(sorted(sizes))
