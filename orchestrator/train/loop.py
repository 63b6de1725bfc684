"""The loop of one attempt of a trial: boundary, step, telemetry; and at each report evaluation, commit, credit.

Runs on every rank of a worker group. Talks to the outside only through a `Link` and a `Boundary`, so a test can run
it without Ray. Within its envelope a trial protects itself at once (a non-finite gradient raises the tier) and says so.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.control.orders import (
    Ack,
    Grant,
    Outcome,
    OverrideReport,
    Report,
    SlotOrder,
    Status,
    StopMode,
    TierReport,
    TrialOrder,
)
from orchestrator.errors import ApplyError, OutOfMemoryError
from orchestrator.jobs import job_info
from orchestrator.jobs.job import Job
from orchestrator.policies.tier import is_cheaper
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.telemetry.record import (
    FLAG_APPLIED,
    FLAG_COMPILED,
    FLAG_GRAPH,
    FLAG_ROLLED_BACK,
    FLAG_SKIPPED,
    FLAG_UNSETTLED,
    tier_code,
)
from orchestrator.train.batch.guard import MemoryGuard, Move, is_out_of_memory
from orchestrator.train.batch.memory import MemoryMeter
from orchestrator.train.boundary import Boundary
from orchestrator.train.groups import Ranks
from orchestrator.train.link import Link
from orchestrator.train.precision.calibrate import calibration_key
from orchestrator.train.precision.guard import Move as TierMove
from orchestrator.train.precision.watch import PrecisionWatch, StepNews, WatchPlan
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_result import StepResult
from orchestrator.train.stepper import Stepper

logger = logging.getLogger(__name__)

MAX_SKIPS = 3
"""Consecutive non-finite steps in the dearest tier after which a trial is given up as diverged."""


class TrialLoop:
    """One attempt of one trial on one rank."""

    def __init__(
        self, order: SlotOrder, job: Job, ranks: Ranks, boundary: Boundary, link: Link, share: ShareMechanism
    ) -> None:
        assert order.trial is not None
        self._trial: TrialOrder = order.trial
        self._ranks, self._boundary, self._link, self._share = ranks, boundary, link, share
        self._directory = Path(self._trial.directory)
        self._job = job
        self._stepper: Stepper | None = None
        self._meter = MemoryMeter(ranks.device, self._trial.memory_bytes)
        self._guard: MemoryGuard | None = None
        self._watch: PrecisionWatch | None = None
        self._is_rolled_back = False
        self._move: TierMove | None = None
        self._order = order
        self._grant: Grant | None = None
        self._unsaid_ack: Ack | None = None
        self._num_reports = self._trial.num_reports_done
        self._num_overrides = 0
        self._num_skips = 0
        self._seq = 0
        self._launched: deque[_Times] = deque()
        self._mode_said = ""

    def run(self) -> Outcome:
        """Train until the trial is done or told to leave.

        Raises:
            ApplyError: it diverged, or an allocation could not be applied.
            OutOfMemoryError: it must begin again from its last commit, or is given up.
        """
        stepper = self._stepper = Stepper(self._trial, self._job, self._ranks)
        self._guard = MemoryGuard(stepper, self._ranks, self._meter, self._trial.trial_id)
        watch = self._watch = PrecisionWatch(self._watch_plan(), stepper, self._ranks.device, self._ranks.group)
        if self._trial.resume_from is not None:
            extra = stepper.resume(Path(self._trial.resume_from))
            self._num_reports = max(self._num_reports, int(extra["num_reports"]))
            watch.guard.restore(extra.get("guard"))
            logger.info("resumed from %s at step %d", self._trial.resume_from, stepper.step_index)
        self._follow(None, stepper)
        if not self._await(lambda: self._grant is not None, stepper):
            return self._leave(stepper)
        watch.begin()
        self._tell_tiers(stepper)
        while self._num_reports < self._trial.max_reports:
            if not self._train_to_report(stepper) or not self._report(stepper):
                return self._leave(stepper)
        return self._outcome(Status.DONE, stepper)

    @property
    def progress(self) -> tuple[int, int]:
        """Steps and samples done so far, for the outcome of an attempt that raised."""
        if self._stepper is None:
            return 0, 0
        return self._stepper.step_index, self._stepper.cursor.position

    @property
    def _is_paused(self) -> bool:
        """Whether the trial holds no share and waits at its boundary with all its state."""
        return self._grant is not None and self._grant.settings.share == 0

    def _train_to_report(self, stepper: Stepper) -> bool:
        """Step until the next report is due; False when told to leave before."""
        target = (self._num_reports + 1) * self._trial.samples_per_report
        while stepper.cursor.position < target or self._settle_below(target, stepper):
            self._guard_precision(stepper)
            began_s, cpu_s = time.monotonic(), time.process_time()
            switch_s = self._cross(stepper)
            if self._is_paused:
                stepper.away()
            if not self._await(lambda: not self._is_paused, stepper):
                return False
            stepper.offload.back()
            wait_s = self._share.hold_back()
            results, move = self._advance()
            times = _Times(
                began_s=began_s,
                step_s=time.monotonic() - began_s,
                cpu_s=time.process_time() - cpu_s,
                wait_s=wait_s,
                switch_s=switch_s,
            )
            if move is not None:
                self._override(stepper, move)
            self._launched.append(times)
            self._take(results, stepper)
        return True

    def _advance(self) -> tuple[list[StepResult], Move | None]:
        """One more step; whoever watches the groups of several ranks sees how long it takes."""
        assert self._guard is not None
        self._ranks.stall.begin()
        try:
            return self._guard.advance()
        finally:
            self._ranks.stall.end()

    def _settle_below(self, target: int, stepper: Stepper) -> bool:
        """Wait for the steps on their way; whether that put the trial back below the target."""
        self._take(stepper.settle(), stepper)
        return stepper.cursor.position < target

    def _take(self, results: list[StepResult], stepper: Stepper) -> None:
        """Record what came of steps; they come back in the order in which they began."""
        for result in results:
            times = self._launched.popleft()
            self._record(result, times, stepper)
            if result.is_skipped:
                self._launched.clear()  # what was begun behind it did nothing
            self._protect(stepper, result, times.step_s - times.wait_s)
        words = stepper.mode_words if results else ""
        if words and words != self._mode_said:
            self._mode_said = words
            logger.info("step mode at step %d: %s", stepper.step_index, self._mode_said)
            measured = stepper.measured_mode
            if measured is not None and self._ranks.rank == 0:
                self._link.outbox.add_mode(measured)

    def _cross(self, stepper: Stepper) -> float:
        """Follow a new order from here on; returns the seconds that took."""
        order = self._boundary.cross()
        self._say_ack()
        return self._follow(order, stepper)

    def _follow(self, order: SlotOrder | None, stepper: Stepper) -> float:
        """Make an order the current one and apply the allocation it brings; returns the seconds that took."""
        if order is not None:
            self._order = order
        grant = self._order.grant
        if grant is None or (self._grant is not None and grant.generation <= self._grant.generation):
            return 0.0
        return self._apply(grant, stepper)

    def _apply(self, grant: Grant, stepper: Stepper) -> float:
        """Turn all dials; every rank does so before the same step. Returns the seconds that took."""
        self._take(stepper.settle(), stepper)  # steps on their way belong to the grant before
        began_s = time.monotonic()
        if grant.settings.share > 0:  # a pause is kept here, at the boundary; no mechanism knows a share of nothing
            self._share.apply(grant.units[self._ranks.rank], grant.amount)
        assert self._guard is not None
        settings = self._guard.prepare(grant.settings)
        stepper.turn(settings)
        self._watched.turned()
        self._grant = grant
        applied_s = time.monotonic()
        self._unsaid_ack = Ack(
            generation=grant.generation,
            settings=grant.settings,
            step=stepper.step_index,
            applied_s=applied_s,
            switch_s=applied_s - began_s,
        )
        if self._ranks.world_size == 1:
            self._say_ack()
        if settings != grant.settings:
            asked = grant.settings
            reason = f"no room for micro-batch {asked.micro_batch} in {asked.tier}: goes on with {settings.micro_batch}"
            self._override(
                stepper, Move(instead_of=asked, reason=f"{reason} x {settings.grad_accum} in {settings.tier}")
            )
        return applied_s - began_s

    def _say_ack(self) -> None:
        """Acknowledge one boundary later: the step in between proved that every rank has applied it."""
        if self._unsaid_ack is not None and self._ranks.rank == 0:
            self._link.outbox.add_ack(self._unsaid_ack)
        self._unsaid_ack = None

    def _guard_precision(self, stepper: Stepper) -> None:
        """Between two steps: make the move that a step asked for, and probe if it is time to."""
        if self._move is not None or self._watched.is_due:
            self._take(stepper.settle(), stepper)
        move, self._move = self._move, None
        if move is not None and is_cheaper(stepper.settings.tier, move.tier):
            self._obey(move, stepper)
        probed = self._watched.before_step()
        if probed is not None:
            self._obey(probed, stepper)
        self._tell_tiers(stepper)

    def _protect(self, stepper: Stepper, result: StepResult, busy_s: float) -> None:
        """Let the guard judge a step; a trial that does not come right in its dearest tier is given up."""
        settings = stepper.settings
        move = self._watched.after_step(
            StepNews(
                is_skipped=result.is_skipped,
                is_loss_finite=result.is_loss_finite,
                loss=result.loss,
                loss_scale=stepper.loss_scale.scale,
                busy_s=busy_s,
                grad_norm=result.grad_norm,
            )
        )
        self._num_skips = self._num_skips + 1 if result.is_skipped else 0
        if move is None and self._num_skips >= MAX_SKIPS and self._watched.guard.dearer(settings.tier) is None:
            raise ApplyError(
                f"{self._trial.trial_id} diverged: the gradient at step {stepper.step_index} was not finite"
                f" {self._num_skips} times in {settings.tier}, the dearest tier allowed; lower the learning rate"
            )
        self._move = move or self._move

    def _obey(self, move: TierMove, stepper: Stepper) -> None:
        """Make a protective move of the tier at once, inside the envelope, and say so."""
        self._tell_tiers(stepper)
        settings, step = stepper.settings, stepper.step_index
        self._is_rolled_back |= move.is_rollback and self._watched.go_back()
        stepper.turn(replace(settings, tier=move.tier))
        self._watched.turned()
        back = f"back to step {stepper.step_index}, " if stepper.step_index != step else ""
        reason = f"{move.reason}: {back}goes on in {move.tier}"
        self._override(stepper, Move(instead_of=settings, reason=reason), is_lasting=not self._watched.is_probing)

    def _override(self, stepper: Stepper, move: Move, *, is_lasting: bool = True) -> None:
        """Tell of a protective move that was made."""
        self._num_overrides += 1
        logger.warning("override %d: %s", self._num_overrides, move.reason)
        if self._ranks.rank == 0:
            report = OverrideReport(
                generation=0 if self._grant is None else self._grant.generation,
                number=self._trial.attempt * 1_000_000 + self._num_overrides,
                settings=stepper.settings,
                step=stepper.step_index,
                reason=move.reason,
                instead_of=move.instead_of,
                is_lasting=is_lasting,
            )
            self._link.outbox.add_override(report)

    def _tell_tiers(self, stepper: Stepper) -> None:
        """Pass on what is newly known of the tiers."""
        tiers = self._watched.news()
        if tiers is not None and self._ranks.rank == 0:
            report = TierReport(step=stepper.step_index, tiers=tiers, spent_s=self._watched.spent_s)
            self._link.outbox.add_tiers(report)

    @property
    def _watched(self) -> PrecisionWatch:
        assert self._watch is not None, "made before anything is stepped or applied"
        return self._watch

    def _watch_plan(self) -> WatchPlan:
        trial, ranks = self._trial, self._ranks
        fixed = [
            f"{param.name}={trial.params[param.name]}"
            for param in job_info(trial.job).params
            if param.changes_speed and param.name in trial.params
        ]
        return WatchPlan(
            ladder=trial.limits.tiers,
            budget=trial.probe_budget,
            target_samples=trial.samples_per_report * trial.max_reports,
            key=calibration_key(trial.job, fixed, trial.start.micro_batch, ranks.world_size, ranks.device),
            # Beside the runs, so that the next run of the same shape need not measure again.
            cache=self._directory.parents[2] / ".calibration" if len(self._directory.parents) > 2 else None,
        )

    def _report(self, stepper: Stepper) -> bool:
        """Evaluate, commit, tell the search, and wait for its word to go on; False when told to leave."""
        metrics = self._evaluate(stepper)
        self._num_reports += 1
        path = self._commit(stepper)
        if self._ranks.rank == 0:
            self._link.outbox.add_report(
                Report(
                    index=self._num_reports - 1,
                    step=stepper.step_index,
                    num_samples=stepper.cursor.position,
                    metrics=metrics,
                    checkpoint=str(path),
                )
            )
        self._watched.committed()
        logger.info("report %d at step %d: %s", self._num_reports - 1, stepper.step_index, metrics)
        if self._num_reports >= self._trial.max_reports:
            return True
        return self._await(lambda: self._order.credit > self._num_reports, stepper)

    def _evaluate(self, stepper: Stepper) -> dict[str, float]:
        """Validation metrics; an evaluation that runs out of memory is begun again with the trial, from its commit."""
        try:
            return stepper.evaluate()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            text = f"{self._trial.trial_id} ran out of memory in its evaluation: {error}"
            raise OutOfMemoryError(text, settings=stepper.settings) from None

    def _await(self, is_met: Callable[[], bool], stepper: Stepper) -> bool:
        """Wait at a boundary until an order meets a condition; False when told to leave first."""
        while self._order.stop is StopMode.NONE:
            if is_met():
                return True
            order = self._boundary.wait()
            self._say_ack()
            self._follow(order, stepper)
        return False

    def _leave(self, stepper: Stepper) -> Outcome:
        """Do what the order to stop asks for."""
        self._take(stepper.settle(), stepper)
        stepper.offload.back()
        if self._order.stop.commits:
            path = self._commit(stepper) if self._grant is not None else None
            return self._outcome(Status.INTERRUPTED, stepper, path)
        return self._outcome(Status.STOPPED, stepper)

    def _commit(self, stepper: Stepper) -> Path:
        extra = {"num_reports": self._num_reports, "guard": self._watched.guard.state()}
        return stepper.commit(self._directory / "checkpoints", extra)

    def _outcome(self, status: Status, stepper: Stepper, path: Path | None = None) -> Outcome:
        return Outcome(
            status=status,
            step=stepper.step_index,
            num_samples=stepper.cursor.position,
            reason="",
            checkpoint=None if path is None else str(path),
        )

    def _record(self, result: StepResult, times: _Times, stepper: Stepper) -> None:
        """Append this step's telemetry; fields in the order of STEP_DTYPE."""
        settings, grant = stepper.settings, self._grant
        assert grant is not None
        flags = (FLAG_SKIPPED if result.is_skipped else 0) | (FLAG_APPLIED if times.switch_s else 0)
        flags |= FLAG_GRAPH if result.mode.is_replayed else 0
        flags |= FLAG_COMPILED if result.mode is StepMode.COMPILED else 0
        flags |= 0 if stepper.is_settled_on(result.mode) else FLAG_UNSETTLED
        flags |= FLAG_ROLLED_BACK if self._is_rolled_back else 0
        self._is_rolled_back = False
        nan = float("nan")
        self._link.outbox.add_record(
            (
                self._seq,
                result.step,
                grant.generation,
                result.position,
                result.num_samples,
                settings.micro_batch,
                settings.grad_accum,
                settings.num_workers,
                tier_code(settings.tier),
                flags,
                settings.share,
                grant.amount,
                times.began_s,
                times.step_s,
                result.data_s,
                times.wait_s,
                times.switch_s,
                times.cpu_s,
                result.loss,
                result.grad_norm,
                result.learning_rate,
                nan if result.noise is None else result.noise.noise_trace,
                nan if result.noise is None else result.noise.grad_sq,
                self._meter.observe(settings),
            )
        )
        self._seq += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """When a step began, and where its seconds went."""

    began_s: float
    step_s: float
    cpu_s: float
    wait_s: float
    switch_s: float
