"""What the last seconds of one trial's telemetry say: rates, loss, staleness, observations for the fit.

One window per trial attempt, in the policy actor. Rows that cannot be true (`telemetry.validation`) are refused and
counted. The numbers come from rank 0; the other ranks are watched for stragglers and memory. What is kept is
bounded, whatever is sent. Knows no Ray, no plan and no clock: the time is an argument. Called by the controller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from orchestrator.policies.learn.fit import Observation
from orchestrator.share.verification import Usage
from orchestrator.telemetry import validation
from orchestrator.telemetry.lag import ClockLag
from orchestrator.telemetry.record import (
    FLAG_GRAPH,
    FLAG_ROLLED_BACK,
    FLAG_SKIPPED,
    MODE_FLAGS,
    STEP_DTYPE,
    StepArray,
    mode_of,
    num_steps_of,
    step_seconds_of,
    tier_of,
)
from orchestrator.telemetry.rows import Rows, end_s
from orchestrator.telemetry.stretch import SETTINGS, Stretch, changes_of, newest_stretch, ordinary
from orchestrator.telemetry.usage import UsageMeter
from orchestrator.telemetry.validation import Anchor, Bounds, Floats
from orchestrator.telemetry.window_view import FoldReport, WindowView

MAX_PENDING_ROWS = 16_384
"""Rows kept between two calls of `observations`; beyond, the oldest go."""

_MAX_RECENT_ROWS = 4_096
_MAX_TAIL_ROWS = 64
_FUTURE_SLACK_S = 1.0
_LOSS_STEPS = 20
"""Steps over which the loss is smoothed (time constant of the average)."""

_STALE_STEPS = 5
_ONE_CORE = 1e-3
_JUDGED_MEMORY = 2_000
_MIN_JUDGED = 50


@dataclass(slots=True)
class _Rank:
    """What is remembered of one rank."""

    anchor: Anchor | None = None
    last_seq: int | None = None
    clock_lag_s: float | None = None
    memory_bytes: int = 0
    busy_s: Floats = field(default_factory=lambda: np.empty(0))
    usage: UsageMeter = field(default_factory=UsageMeter)


class TrialWindow:
    """The telemetry of one attempt of one trial.

    Args:
        stale_after_s: silence after which the trial counts as stale; five of its steps, if that is longer.
        num_workers: ranks of the trial, None to take what the rows say.
        window_s: seconds that rates look back.
        has_shared_clock: whether the ranks read the same CLOCK_MONOTONIC as `now_s`, being on one node. If not, the
            first batch of a rank sets its clock against ours.
        max_refused_ratio: part of the recent rows that may be refused before the trial is suspect.
        computes_on_cpu: whether all its devices are CPUs, so that CPU seconds say for how long a rank computed.
        max_samples: samples that a step of it can have at most, None where nobody knows.

    Attributes:
        lag: how far behind its clock tells the time.
    """

    def __init__(
        self,
        *,
        stale_after_s: float,
        num_workers: int | None = None,
        window_s: float = 5.0,
        has_shared_clock: bool = True,
        max_refused_ratio: float = 0.05,
        computes_on_cpu: bool = False,
        max_samples: int | None = None,
    ) -> None:
        self.lag, self._max_samples = ClockLag(), max_samples
        self._stale_after_s, self._num_workers, self._window_s = stale_after_s, num_workers, window_s
        self._has_shared_clock, self._max_refused_ratio = has_shared_clock, max_refused_ratio
        self._computes_on_cpu = computes_on_cpu
        self._ranks: dict[int, _Rank] = {}
        self._pending, self._recent = Rows(MAX_PENDING_ROWS), Rows(_MAX_RECENT_ROWS)
        self._rates: tuple[float | None, float | None, float] | None = None
        self._heard_at_s: float | None = None
        self._updated_s: float | None = None
        self._step = self._num_samples = self._cursor = self._generation = 0
        self._flags, self._has_rows = 0, False
        self._loss: float | None = None
        self._noise: tuple[float, float] | None = None
        self._num_refused = self._num_missing = 0
        self._judged = self._judged_bad = 0.0

    def fold(self, rank: int, records: StepArray, now_s: float, *, newest_generation: int) -> FoldReport:
        """Take in a batch of one rank; never raises, whatever the rows say. Sending a batch again changes nothing.

        Args:
            rank: the sender, as the connection knows it.
            records: rows of dtype `STEP_DTYPE`, oldest first.
            now_s: when the batch arrived.
            newest_generation: newest plan that was offered; rows of a later one are refused.
        """
        if self._heard_at_s is None:
            self._heard_at_s = now_s
        wrong = self._wrong_batch(rank, records)
        if wrong is not None:
            return self._report(np.full(len(records), validation.code_of(wrong), dtype=np.int8), 0)
        if not len(records):
            return self._report(np.zeros(0, dtype=np.int8), 0)
        state = self._ranks.setdefault(rank, _Rank())
        codes = validation.judge(records, self._bounds(state, records, now_s, newest_generation))
        missing = _advance_seq(state, records, codes)
        good = codes == validation.GOOD
        if good.any():
            rows = records[good]
            _advance_rank(state, rows)
            if rank == 0:
                self._heard_at_s = now_s
                self.lag.add(now_s, float(end_s(rows[-1:])[0]))
                self._advance_trial(rows)
        return self._report(codes, missing)

    def observations(self, now_s: float) -> tuple[Observation, ...]:  # noqa: ARG002 - every reader is told the time
        """Steps of rank 0 since the last call, summarised by the settings they ran under, oldest settings first.

        Left out: skipped steps, the first step after an applied allocation, steps while it is being measured which step
        mode these dials shall have, and the smaller batch at an end.
        """
        rows = ordinary(self._pending.joined())
        self._pending.clear()
        return tuple(_summarise(group, self._sync_s(group)) for group in _same_settings(rows))

    def stretch(self, began_after_s: float | None = None) -> Stretch | None:
        """Its speed since its dials last turned, over the last seconds at most; None before a step counts.

        Args:
            began_after_s: leave out steps that began before that time.
        """
        rows = self._recent.joined()
        return newest_stretch(rows if began_after_s is None else rows[rows["start_s"] >= began_after_s])

    def usage(self) -> Usage | None:
        """CPU time of the rank that used the most of its share since that last changed; None before a step counts."""
        known = [usage for state in self._ranks.values() if (usage := state.usage.now) is not None]
        return max(known, key=lambda usage: usage.cpu_s / max(usage.wall_s * usage.cores, 1e-9), default=None)

    def view(self, now_s: float) -> WindowView:
        """The trial as it stands at `now_s`."""
        if self._heard_at_s is None:
            self._heard_at_s = now_s
        if self._rates is None:  # asked for several times in each decision
            self._rates = self._measured_rates()
        throughput_per_s, step_s, longest_s = self._rates
        silence_s = max(self._stale_after_s, _STALE_STEPS * longest_s)
        noise_trace, grad_sq = self._noise or (None, None)
        return WindowView(
            step=self._step,
            num_samples=self._num_samples,
            cursor=self._cursor,
            generation=self._generation,
            updated_s=self._updated_s,
            throughput_per_s=throughput_per_s,
            step_s=step_s,
            loss=self._loss,
            memory_bytes=max((state.memory_bytes for state in self._ranks.values()), default=0) or None,
            noise_trace=noise_trace,
            grad_sq=grad_sq,
            straggler_ratio=self._straggler_ratio(),
            step_mode=mode_of(self._flags) if self._has_rows else None,
            is_stale=now_s - self._heard_at_s > silence_s,
            is_suspect=self._judged >= _MIN_JUDGED and self._judged_bad > self._max_refused_ratio * self._judged,
            num_refused=self._num_refused,
            num_missing=self._num_missing,
        )

    def _wrong_batch(self, rank: int, records: StepArray) -> str | None:
        if records.dtype != STEP_DTYPE:
            return "shape"
        if rank < 0 or (self._num_workers is not None and rank >= self._num_workers):
            return "rank"
        return None

    def _bounds(self, state: _Rank, records: StepArray, now_s: float, newest_generation: int) -> Bounds:
        if state.clock_lag_s is None:
            end_s = float(records["start_s"][-1]) + float(records["step_s"][-1])
            state.clock_lag_s = 0.0 if self._has_shared_clock or not np.isfinite(end_s) else now_s - end_s
        return Bounds(
            newest_generation=newest_generation,
            num_workers=self._num_workers,
            latest_end_s=now_s - state.clock_lag_s + _FUTURE_SLACK_S,
            last_seq=state.last_seq,
            anchor=state.anchor,
            max_samples=self._max_samples,
        )

    def _advance_trial(self, rows: StepArray) -> None:
        """Fold accepted rows of rank 0, at least one."""
        last = rows[-1]
        if not self._has_rows:
            self._has_rows, self._num_samples = True, int(rows["cursor"][0])
        back = np.flatnonzero(rows["flags"] & FLAG_ROLLED_BACK)
        if len(back):  # what was done since the state it went back to does not count
            self._num_samples = int(rows["cursor"][back[-1]])
        counted = rows[back[-1] :] if len(back) else rows
        self._num_samples += int(counted["num_samples"].sum(dtype=np.int64))
        num_steps = num_steps_of(rows)
        self._step = int(last["step"]) + (0 if int(last["flags"]) & FLAG_SKIPPED else int(num_steps[-1]))
        self._cursor = int(last["cursor"]) + int(last["num_samples"])
        self._generation = int(last["generation"])
        self._flags = int(last["flags"])
        self._updated_s = float(end_s(rows[-1:])[0])
        self._pending.add(rows)
        self._recent.add(rows)
        self._rates = None
        self._recent.trim(float(end_s(rows[-1:])[0]) - self._window_s)
        is_known = np.isfinite(rows["loss"])
        self._advance_loss(rows["loss"][is_known].astype(np.float64), num_steps[is_known])
        known = np.flatnonzero(np.isfinite(rows["noise_trace"]) & np.isfinite(rows["grad_sq"]))
        if len(known):
            self._noise = float(rows["noise_trace"][known[-1]]), float(rows["grad_sq"][known[-1]])

    def _advance_loss(self, losses: Floats, num_steps: validation.Ints) -> None:
        if not len(losses):
            return
        # One exponential average over the whole batch at once: weights decay by `keep` with every later step.
        keep = 1.0 - 1.0 / _LOSS_STEPS
        start = float(losses[0]) if self._loss is None else self._loss
        later = num_steps[::-1].cumsum()[::-1] - num_steps
        weights = (1.0 - keep**num_steps) * keep**later
        self._loss = start * keep ** float(num_steps.sum()) + float(weights @ losses)

    def _measured_rates(self) -> tuple[float | None, float | None, float]:
        """Samples/s and median and longest step seconds over the window before the last row."""
        rows = self._recent.joined()
        if not len(rows):
            return None, None, 0.0
        ends_s = end_s(rows)
        rows = rows[ends_s > ends_s[-1] - self._window_s]
        # Wall time and not the sum of steps: time that no step accounts for (evaluation, a pause) is time gone by.
        span_s = float(ends_s[-1] - rows["start_s"][0])
        throughput_per_s = float(rows["num_samples"].sum(dtype=np.int64)) / span_s if span_s > 0 else None
        step_s = step_seconds_of(rows)
        return throughput_per_s, float(np.median(step_s)), float(step_s.max())

    def _straggler_ratio(self) -> float:
        medians = [float(np.median(state.busy_s)) for state in self._ranks.values() if len(state.busy_s)]
        middle = float(np.median(medians)) if len(medians) > 1 else 0.0
        return max(medians) / middle if middle > 0 else 1.0

    def _sync_s(self, rows: StepArray) -> float | None:
        """Seconds per step that rank 0 waited for the others; None for one rank, and where it cannot be told.

        It can on one core of a CPU: what is left of the step when computing, loading and holding back are taken out.
        On more cores threads are not busy all the time, and a GPU's work is no CPU time.
        """
        is_one_core = abs(float(rows["cores"][0]) - 1.0) <= _ONE_CORE
        if not self._computes_on_cpu or not is_one_core or int(rows["num_workers"][0]) < 2:
            return None
        busy_s = sum(rows[name].astype(np.float64) for name in ("cpu_s", "data_s", "wait_s", "switch_s"))
        return float(np.median(np.maximum(0.0, rows["step_s"] - busy_s)))

    def _report(self, codes: validation.Codes, missing: int) -> FoldReport:
        accepted = int((codes == validation.GOOD).sum())
        refused = int((codes > validation.GOOD).sum())
        self._num_refused += refused
        self._num_missing += missing
        self._judged += accepted + refused
        self._judged_bad += refused
        if self._judged > _JUDGED_MEMORY:
            # Forgetting by halves: a trial that behaves again is trusted again.
            self._judged, self._judged_bad = self._judged / 2, self._judged_bad / 2
        reasons: tuple[tuple[str, int], ...] = ()
        if refused:
            numbers = np.bincount(codes[codes > 0], minlength=len(validation.REASONS))
            order = sorted(np.flatnonzero(numbers), key=lambda code: (-int(numbers[code]), int(code)))
            reasons = tuple((validation.REASONS[code], int(numbers[code])) for code in order)
        return FoldReport(
            accepted=accepted,
            refused=refused,
            duplicates=len(codes) - accepted - refused,
            missing=missing,
            reasons=reasons,
            mask=codes == validation.GOOD,
        )


def _advance_seq(state: _Rank, records: StepArray, codes: validation.Codes) -> int:
    """Remember the highest credible sequence number; returns how many below it were never seen."""
    fresh = records["seq"][(codes != validation.DUPLICATE) & (codes != validation.code_of("seq"))]
    if not len(fresh):
        return 0
    highest = int(fresh.max())
    before = int(fresh[0]) - 1 if state.last_seq is None else state.last_seq
    state.last_seq = highest
    return highest - before - len(fresh)


def _advance_rank(state: _Rank, rows: StepArray) -> None:
    last = rows[-1]
    latest_s = float(end_s(rows).max())
    if state.anchor is not None:
        latest_s = max(latest_s, state.anchor.end_s)
    num_steps = num_steps_of(rows)
    state.anchor = Anchor(seq=int(last["seq"]), step=int(last["step"]), end_s=latest_s, num_steps=int(num_steps[-1]))
    state.memory_bytes = int(last["memory_bytes"]) or state.memory_bytes  # 0 while it is not known
    state.usage.add(rows)
    busy_s = (rows["step_s"] - rows["wait_s"]).astype(np.float64) / num_steps
    state.busy_s = np.concatenate((state.busy_s, busy_s))[-_MAX_TAIL_ROWS:]


def _same_settings(rows: StepArray) -> Iterator[StepArray]:
    """Rows grouped by generation, settings and step mode, in order of first appearance."""
    if not len(rows):
        return
    groups: dict[tuple[float, ...], list[StepArray]] = {}
    # Settings change rarely: cutting at changes leaves a handful of runs to group, not thousands of rows.
    for run in np.split(rows, changes_of(rows) + 1):
        key = (*(run[name][0].item() for name in SETTINGS), int(run["flags"][0]) & MODE_FLAGS)
        groups.setdefault(key, []).append(run)
    for runs in groups.values():
        yield np.concatenate(runs)


def _summarise(rows: StepArray, sync_s: float | None) -> Observation:
    """One observation of rows that ran under the same settings, at least one."""
    first = rows[0]
    tier = tier_of(int(first["tier"]))
    assert tier is not None, "validation refuses codes that name no tier"
    estimated = rows[np.isfinite(rows["noise_trace"]) & np.isfinite(rows["grad_sq"])]
    return Observation(
        # Single precision on the wire must not make two cells of what is one setting.
        cores=round(float(first["cores"]), 4),
        tier=tier,
        micro_batch=int(first["micro_batch"]),
        grad_accum=int(first["grad_accum"]),
        num_workers=int(first["num_workers"]),
        num_steps=int(num_steps_of(rows).sum()),
        step_s=float(np.median(step_seconds_of(rows))),
        noise_trace=float(estimated["noise_trace"].mean(dtype=np.float64)) if len(estimated) else None,
        grad_sq=float(estimated["grad_sq"].mean(dtype=np.float64)) if len(estimated) else None,
        num_noise=len(estimated),
        memory_bytes=int(rows["memory_bytes"].max()) or None,
        sync_s=sync_s,
        is_replayed=bool(int(first["flags"]) & FLAG_GRAPH),
    )
