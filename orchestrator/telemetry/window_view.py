"""What `window` says: of a batch that was taken in, and of a trial as it stands. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.telemetry.validation import Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldReport:
    """What became of one batch.

    Attributes:
        accepted: rows that count.
        refused: rows that cannot be true.
        duplicates: rows seen before; dropped, and nobody's fault.
        missing: rows that were never seen, judged by gaps in the sequence.
        reasons: why rows were refused, with their number, most frequent first.
        mask: True for each accepted row of the batch.
    """

    accepted: int
    refused: int
    duplicates: int
    missing: int
    reasons: tuple[tuple[str, int], ...]
    mask: Bools = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowView:
    """A trial's telemetry in numbers. None where nothing was measured yet.

    Attributes:
        step: optimizer steps done.
        num_samples: samples consumed since the start of training, as far as seen.
        cursor: global sample position after the last row.
        generation: of the allocation that the last row ran under.
        updated_s: when the last row's step ended, on the rank's clock; None before the first.
        throughput_per_s: samples/s of wall time over the last seconds.
        step_s: median seconds per step over the last seconds.
        loss: smoothed training loss.
        memory_bytes: last peak memory, the largest over all ranks.
        noise_trace: last estimate of tr(Sigma).
        grad_sq: last estimate of |G|^2, of the same row.
        straggler_ratio: slowest rank's median busy time over that of all ranks; 1 for one rank.
        step_mode: how the last step was executed; None before the first.
        is_stale: whether rank 0 has been silent for too long.
        is_suspect: whether so many rows were refused that the rest should not be relied on either.
        num_refused: rows refused so far.
        num_missing: rows lost so far.
    """

    step: int
    num_samples: int
    cursor: int
    generation: int
    updated_s: float | None
    throughput_per_s: float | None
    step_s: float | None
    loss: float | None
    memory_bytes: int | None
    noise_trace: float | None
    grad_sq: float | None
    straggler_ratio: float
    step_mode: str | None
    is_stale: bool
    is_suspect: bool
    num_refused: int
    num_missing: int
