"""How much memory a rank takes: bytes = fixed + per_sample * micro_batch, a line per tier and number of workers.

The points are peaks that were measured while trials ran; trials of one shape share them. A tier that was never measured
borrows the line of the measured tier that takes most. It knows no device: what a rank may take is an argument. Asked by
policies before a larger batch or another tier, by the controller before it admits a trial, and by the ranks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.policies.tier import Tier

MAX_POINTS = 24
MARGIN_RATIO = 0.08
"""Part of a prediction that is added for fragmentation: an allocator cannot use every byte of what it holds."""
DOUBT_PER_DOUBLING = 0.03
"""What is added for each doubling beyond the largest micro-batch that was measured."""
_FORGET_RATIO = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """The peak of one rank at one setting.

    Attributes:
        tier, num_workers, micro_batch: the setting.
        peak_bytes: the largest amount of memory that one step took.
    """

    tier: Tier
    num_workers: int
    micro_batch: int
    peak_bytes: int

    @property
    def key(self) -> tuple[Tier, int, int]:
        """What tells it from other points."""
        return (self.tier, self.num_workers, self.micro_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLine:
    """The line through the points of one tier.

    Attributes:
        fixed_bytes: what does not grow with the micro-batch: weights, optimizer state, buffers.
        sample_bytes: what each further sample of the micro-batch adds.
        largest: the largest micro-batch that was measured.
    """

    fixed_bytes: float
    sample_bytes: float
    largest: int

    def needed_bytes(self, micro_batch: int) -> float:
        """What a rank needs at `micro_batch`, the margin included.

        >>> round(MemoryLine(fixed_bytes=100.0, sample_bytes=10.0, largest=10).needed_bytes(10))
        216
        """
        doublings = max(0.0, math.log2(micro_batch / self.largest))
        margin = MARGIN_RATIO + DOUBT_PER_DOUBLING * doublings
        return (self.fixed_bytes + self.sample_bytes * micro_batch) * (1 + margin)


def solve_line(
    points: Iterable[MemoryPoint], tier: Tier, num_workers: int, fixed_bytes: float = 0.0
) -> MemoryLine | None:
    """The line of `tier`, or that of the hungriest measured tier where it was never measured; None without any point.

    With one size alone all of it but `fixed_bytes` counts as growing: that overrates a larger micro-batch, and never
    underrates one. The line lies above all its points.

    >>> points = [MemoryPoint(tier=Tier.FP32, num_workers=1, micro_batch=m, peak_bytes=100 + 10 * m) for m in (2, 8)]
    >>> line = solve_line(points, Tier.FP32, 1)
    >>> (round(line.fixed_bytes), round(line.sample_bytes)) if line else None
    (100, 10)
    """
    by_tier: dict[Tier, list[MemoryPoint]] = {}
    for point in points:
        if point.num_workers == num_workers:
            by_tier.setdefault(point.tier, []).append(point)
    if tier in by_tier:
        return _fit(by_tier[tier], fixed_bytes)
    lines = [_fit(group, fixed_bytes) for _, group in sorted(by_tier.items())]
    return max(lines, key=lambda line: line.needed_bytes(line.largest) / line.largest, default=None)


def fits(points: Iterable[MemoryPoint], tier: Tier, num_workers: int, micro_batch: int, limit_bytes: int) -> bool:
    """Whether a rank is predicted to stay below `limit_bytes`; True where the limit (0) or every point is unknown.

    >>> points = [MemoryPoint(tier=Tier.FP32, num_workers=1, micro_batch=m, peak_bytes=100 + 10 * m) for m in (2, 8)]
    >>> fits(points, Tier.FP32, 1, 15, 300), fits(points, Tier.FP32, 1, 20, 300), fits(points, Tier.FP32, 1, 20, 0)
    (True, False, True)
    """
    if limit_bytes <= 0:
        return True
    line = solve_line(points, tier, num_workers)
    return line is None or line.needed_bytes(micro_batch) <= limit_bytes


def largest_micro_batch(line: MemoryLine, limit_bytes: float, at_most: int) -> int:
    """The largest micro-batch in [1, at_most] that is predicted to stay below `limit_bytes`; 0 where none does.

    >>> largest_micro_batch(MemoryLine(fixed_bytes=100.0, sample_bytes=10.0, largest=64), 333.0, 64)
    20
    """
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if line.needed_bytes(middle) <= limit_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def largest_split(per_rank: int, at_most: int) -> int:
    """The largest micro-batch up to `at_most` that divides a rank's part of the global batch, so that it stays exact.

    >>> largest_split(96, 40), largest_split(64, 40), largest_split(13, 6)
    (32, 32, 1)
    """
    return next(size for size in range(max(1, min(at_most, per_rank)), 0, -1) if per_rank % size == 0)


def remember(points: Sequence[MemoryPoint], new: MemoryPoint) -> tuple[MemoryPoint, ...]:
    """The points with a new measurement; an older, larger peak of the same setting is only slowly forgotten."""
    kept = {point.key: point for point in points}
    old = kept.pop(new.key, None)
    if old is not None:
        peak_bytes = max(new.peak_bytes, int(old.peak_bytes * _FORGET_RATIO))
        new = MemoryPoint(
            tier=new.tier, num_workers=new.num_workers, micro_batch=new.micro_batch, peak_bytes=peak_bytes
        )
    return tuple(sorted([*list(kept.values())[-(MAX_POINTS - 1) :], new], key=lambda point: point.key))


def merge(groups: Iterable[Sequence[MemoryPoint]]) -> tuple[MemoryPoint, ...]:
    """The points of several trials of one shape as one set, whatever their order: the largest peak of each setting."""
    largest: dict[tuple[Tier, int, int], MemoryPoint] = {}
    for points in groups:
        for point in points:
            rival = largest.get(point.key)
            if rival is None or point.peak_bytes > rival.peak_bytes:
                largest[point.key] = point
    return tuple(largest[key] for key in sorted(largest))


def _fit(points: Sequence[MemoryPoint], fixed_bytes: float) -> MemoryLine:
    """Least squares with a slope >= 0, raised until no point lies above it."""
    largest = max(point.micro_batch for point in points)
    sizes = {point.micro_batch for point in points}
    if len(sizes) == 1:
        peak_bytes = max(point.peak_bytes for point in points)
        fixed_bytes = min(fixed_bytes, peak_bytes)
        return MemoryLine(fixed_bytes=fixed_bytes, sample_bytes=(peak_bytes - fixed_bytes) / largest, largest=largest)
    mean_x = sum(p.micro_batch for p in points) / len(points)
    mean_y = sum(p.peak_bytes for p in points) / len(points)
    spread = sum((p.micro_batch - mean_x) ** 2 for p in points)
    slope = max(0.0, sum((p.micro_batch - mean_x) * (p.peak_bytes - mean_y) for p in points) / spread)
    fixed = max(point.peak_bytes - slope * point.micro_batch for point in points)
    return MemoryLine(fixed_bytes=max(0.0, fixed), sample_bytes=slope, largest=largest)
