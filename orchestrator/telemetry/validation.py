"""Which rows of a telemetry batch cannot be true.

A trial's telemetry is not trusted: a bug or a selfish report must not move a plan. Every row is held against ranges,
the newest plan, the rows before it and the time that really went by. A bad row is named by the first check that it
fails; nothing here raises. Pure and vectorised; knows no trial and keeps no state. Called by `telemetry.window`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from orchestrator.telemetry.record import (
    FLAG_BUNDLE,
    FLAG_ROLLED_BACK,
    FLAG_SEVERAL,
    FLAG_SKIPPED,
    StepArray,
    num_steps_of,
    tier_of,
)

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]

GOOD, DUPLICATE = 0, -1
REASONS: tuple[str, ...] = (
    "good",
    "seq",
    "step",
    "generation",
    "cursor",
    "batch",
    "samples",
    "tier",
    "flags",
    "share",
    "time",
    "future",
    "loss",
    "gradient",
    "memory",
    "order",
    "overlap",
    "shape",
    "rank",
)
"""What a code of `judge` stands for; a refused row carries the code of the first check it failed."""

_CODE = {reason: code for code, reason in enumerate(REASONS)}

_MAX_COUNT = 1 << 53
_MAX_BATCH_PART = 1 << 20
_MAX_CORES = 1 << 16
_MAX_MEMORY_BYTES = 1 << 50
_MAX_SEQ_JUMP = 1 << 24
"""Rows that may be lost at once: some hours of a thousand steps per second. A number further off is nonsense."""

_SHARE_SLACK = 1e-3
_PART_SLACK_S = 0.05
_STEP_SLACK_S, _STEP_SLACK_RATIO = 0.005, 0.02
"""Two boundaries are read from one clock, but not in the same instruction."""

_SUM_SLACK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The last accepted row of a rank, from which the next ones go on.

    Attributes:
        seq: its number in the rank's sequence.
        step: optimizer steps done before it.
        num_steps: steps that it tells of.
        end_s: when the latest row so far ended, on the rank's clock.
    """

    seq: int
    step: int
    end_s: float
    num_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the actor itself knows at the moment a batch arrives.

    Attributes:
        newest_generation: newest plan that was offered.
        num_workers: ranks of the trial, None where unknown.
        latest_end_s: latest moment, on the rank's clock, at which a step can have ended.
        last_seq: highest credible sequence number so far, of accepted and refused rows; None for a first batch.
        anchor: the row to go on from, None before the first accepted one.
        max_samples: samples that a step of the trial can have at most, None where nobody knows.
    """

    newest_generation: int
    num_workers: int | None
    latest_end_s: float
    last_seq: int | None
    anchor: Anchor | None
    max_samples: int | None = None


def judge(rows: StepArray, bounds: Bounds) -> Codes:
    """A code per row: `GOOD`, `DUPLICATE` (seen before, harmless), or the index into `REASONS` of what is wrong.

    Args:
        rows: at least one row of dtype `STEP_DTYPE`, in the order in which they were sent.
        bounds: what they must agree with.
    """
    codes: Codes = np.zeros(len(rows), dtype=np.int8)
    # Rows may hold any bit pattern; infinities and signalling NaNs are judged, not warned about.
    with np.errstate(all="ignore"):
        _judge_seq(codes, rows, bounds.last_seq)
        _judge_counts(codes, rows, bounds)
        _judge_times(codes, rows, bounds)
        _judge_measures(codes, rows)
        _judge_order(codes, rows, bounds.anchor)
    return codes


def code_of(reason: str) -> int:
    """The code of a word of `REASONS`."""
    return _CODE[reason]


def _mark(codes: Codes, reason: str, bad: Bools) -> None:
    if bad.any():
        codes[bad & (codes == GOOD)] = _CODE[reason]


def _judge_seq(codes: Codes, rows: StepArray, last_seq: int | None) -> None:
    seq = rows["seq"]
    base = int(seq[0]) if last_seq is None else last_seq
    _mark(codes, "seq", seq > np.uint64(min(base + _MAX_SEQ_JUMP, _MAX_COUNT)))
    before: Ints = np.empty(len(seq), dtype=np.int64)
    before[0] = -1 if last_seq is None else last_seq
    sane: Ints = np.where(codes == GOOD, seq, 0).astype(np.int64)
    before[1:] = np.maximum(np.maximum.accumulate(sane[:-1]), before[0])
    codes[(sane <= before) & (codes == GOOD)] = DUPLICATE


def _judge_counts(codes: Codes, rows: StepArray, bounds: Bounds) -> None:
    step, generation, cursor = rows["step"], rows["generation"], rows["cursor"]
    _mark(codes, "step", (step < 0) | (step > _MAX_COUNT))
    _mark(codes, "generation", (generation < 0) | (generation > bounds.newest_generation))
    _mark(codes, "cursor", (cursor < 0) | (cursor > _MAX_COUNT))
    micro, accum, workers = (rows[name].astype(np.int64) for name in ("micro_batch", "grad_accum", "num_workers"))
    bad = (micro < 1) | (accum < 1) | (workers < 1)
    bad |= np.maximum(np.maximum(micro, accum), workers) > _MAX_BATCH_PART
    if bounds.num_workers is not None:
        bad |= workers != bounds.num_workers
    _mark(codes, "batch", bad)
    samples, flags = rows["num_samples"], rows["flags"]
    # Three factors of at most 2**20 cannot overflow 63 bits; rows with larger ones are out already.
    full = micro * accum * workers
    several = (flags & FLAG_SEVERAL) != 0
    fits = (samples >= 1) & np.where(several, samples % np.maximum(full, 1) == 0, samples <= full)
    if bounds.max_samples is not None:
        fits &= full <= bounds.max_samples
    _mark(codes, "samples", np.where(flags & FLAG_SKIPPED, samples != 0, ~fits))
    unknown = [code for code in np.unique(rows["tier"]) if tier_of(int(code)) is None]
    _mark(codes, "tier", np.isin(rows["tier"], unknown))
    _mark(codes, "flags", flags >= 2 * FLAG_BUNDLE)  # the last one


def _judge_times(codes: Codes, rows: StepArray, bounds: Bounds) -> None:
    start_s, step_s = rows["start_s"], rows["step_s"].astype(np.float64)
    # Written so that NaN fails: every comparison with it is false.
    good = np.isfinite(start_s) & (step_s > 0) & np.isfinite(step_s)
    for name in ("data_s", "wait_s", "switch_s"):
        part_s = rows[name]
        good &= (part_s >= 0) & (part_s <= step_s + _PART_SLACK_S)
    cpu_s = rows["cpu_s"]
    good &= (cpu_s >= 0) & np.isfinite(cpu_s)
    _mark(codes, "time", ~good)
    _mark(codes, "future", ~(start_s + step_s <= bounds.latest_end_s))


def _judge_measures(codes: Codes, rows: StepArray) -> None:
    share, cores = rows["share"], rows["cores"]
    _mark(codes, "share", ~((share >= 0) & (share <= 1 + _SHARE_SLACK) & (cores >= 0) & (cores <= _MAX_CORES)))
    skipped = (rows["flags"] & FLAG_SKIPPED) != 0
    _mark(codes, "loss", ~(np.isfinite(rows["loss"]) | skipped))
    grad_norm, rate = rows["grad_norm"], rows["learning_rate"]
    bad = (np.isinf(grad_norm) | (grad_norm < 0)) & ~skipped
    bad |= ~((rate >= 0) & np.isfinite(rate))
    # An unbiased estimate may be negative, and NaN says that there is none.
    bad |= (np.isinf(rows["noise_trace"]) | np.isinf(rows["grad_sq"])) & ~skipped
    _mark(codes, "gradient", bad)
    memory_bytes = rows["memory_bytes"]
    _mark(codes, "memory", (memory_bytes < 0) | (memory_bytes > _MAX_MEMORY_BYTES))


def _highest_since(step: Ints, back: Bools) -> Ints:
    """The running maximum of `step`, begun anew at each row that went back."""
    highest = step.copy()
    starts = [0, *np.flatnonzero(back).tolist(), len(step)]
    for start, end in pairwise(starts):
        highest[start:end] = np.maximum.accumulate(step[start:end]) if end > start else step[start:end]
    return highest


def _steps_beyond(rows: StepArray, seq: Ints, first: Anchor) -> Ints:
    """How many more steps than records there may have been before each row: of a record that was lost nobody knows."""
    more = num_steps_of(rows) - 1
    beyond: Ints = np.concatenate(([first.num_steps - 1], more[:-1])).cumsum()
    is_lost = np.diff(seq, prepend=first.seq) > 1
    could_be_several = (rows["flags"] & FLAG_SEVERAL) != 0
    beyond[np.logical_or.accumulate(is_lost & could_be_several)] = _MAX_COUNT
    return beyond


def _judge_order(codes: Codes, rows: StepArray, anchor: Anchor | None) -> None:
    """Steps advance by no more than records tell of, and claimed time fits into the time that went by."""
    good = np.flatnonzero(codes == GOOD)
    if not len(good):
        return
    seq: Ints = rows["seq"][good].astype(np.int64)
    step: Ints = rows["step"][good]
    first = Anchor(seq=int(seq[0]), step=int(step[0]), end_s=-np.inf) if anchor is None else anchor
    # A trial that went back to an earlier state says so, and its steps are counted on from there.
    back = (rows["flags"][good] & FLAG_ROLLED_BACK) != 0
    latest = first.step + (seq - first.seq) + _steps_beyond(rows[good], seq, first)
    jumps = (step < first.step) & ~np.logical_or.accumulate(back) | (step > latest)
    highest = _highest_since(np.where(jumps, np.where(back, step, first.step), step), back)
    jumps |= step < highest
    codes[good[jumps]] = _CODE["order"]
    good = good[~jumps]
    if not len(good):
        return
    start_s: Floats = rows["start_s"][good]
    step_s: Floats = rows["step_s"][good].astype(np.float64)
    end_s = start_s + step_s
    # A step may begin a hair before the one before it ended, but not by so much that time is told twice.
    free_s = np.empty_like(end_s)
    free_s[0] = first.end_s
    free_s[1:] = np.maximum(np.maximum.accumulate(end_s[:-1]), first.end_s)
    overlaps = start_s < free_s - (_STEP_SLACK_S + _STEP_SLACK_RATIO * step_s)
    real_s = end_s - (start_s[0] if anchor is None else anchor.end_s)
    overlaps |= np.cumsum(step_s) > real_s * (1 + _STEP_SLACK_RATIO) + _SUM_SLACK_S
    codes[good[overlaps]] = _CODE["overlap"]
