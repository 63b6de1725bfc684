"""The loop of a declared training: step, and at each report evaluation and commit.

Runs on every rank of a worker group. Orders, telemetry and reports are the attempt's; the steps are the stepper's.
Within its limits a trial protects itself at once: after a non-finite gradient it computes in a dearer tier.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.control.orders import Outcome, SlotOrder, Status, TierReport
from orchestrator.errors import ApplyError, OutOfMemoryError
from orchestrator.jobs import job_info
from orchestrator.jobs.training import Training
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import is_cheaper
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.telemetry.record import (
    FLAG_BUNDLE,
    FLAG_COMPILED,
    FLAG_GRAPH,
    FLAG_ROLLED_BACK,
    FLAG_SEVERAL,
    FLAG_SKIPPED,
    FLAG_UNSETTLED,
)
from orchestrator.train.attempt import Attempt, Times
from orchestrator.train.batch.guard import MemoryGuard, Move, is_out_of_memory
from orchestrator.train.batch.memory import MemoryMeter
from orchestrator.train.boundary import Boundary
from orchestrator.train.course import Course, Step, Stepped, Wait
from orchestrator.train.dials.declared import BatchDial, PrecisionDial
from orchestrator.train.dials.dial import Dial
from orchestrator.train.dials.share import ShareDial
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
    """The driver of one attempt of a declared training on one rank.

    Attributes:
        on_away: called before the trial's memory is given back while it is paused.
    """

    def __init__(
        self, order: SlotOrder, job: object, ranks: Ranks, boundary: Boundary, link: Link, share: ShareMechanism
    ) -> None:
        self.attempt = Attempt(order, ranks, boundary, link, share)
        self._trial, self._ranks, self._job = self.attempt.trial, ranks, Training.of(job)
        self._meter = MemoryMeter(ranks.device, self._trial.memory_bytes)
        self._parts: _Parts | None = None
        self._is_rolled_back = False
        self._move: TierMove | None = None
        self._num_skips = 0
        self._launched: deque[Times] = deque()
        self._mode_said = ""
        self._num_together = 0
        self.on_away: Callable[[], None] = lambda: None

    def run(self) -> Outcome:
        """Train until the trial is done or told to leave.

        Raises:
            ApplyError: it diverged, or an allocation could not be applied.
            OutOfMemoryError: it must begin again from its last commit, or is given up.
        """
        course, answer = self.course(), None
        while True:
            try:
                need = course.send(answer)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            answer = self.attempt.wait_until(need.is_met, self) if isinstance(need, Wait) else self.advance()

    def course(self) -> Course:
        """The trial as a course of needs, for whoever runs it."""
        stepper = Stepper(self._trial, self._job, self._ranks)
        self._parts = _Parts(self.attempt, stepper, self._meter, self._watch_plan())
        attempt, watch = self.attempt, self._parts.watch
        if self._trial.resume_from is not None:
            extra = stepper.resume(Path(self._trial.resume_from))
            attempt.num_reports = max(attempt.num_reports, int(extra["num_reports"]))
            watch.guard.restore(extra.get("guard"))
            attempt.resumed(self)
        self._tell_dials()
        attempt.follow(None, self)
        if not (yield Wait(lambda: attempt.grant is not None)):
            return self._leave()
        watch.begin()
        self._tell_tiers()
        while attempt.num_reports < self._trial.max_reports:
            if not (yield from self._train_to_report()) or not (yield from self._report()):
                return self._leave()
        return attempt.outcome(Status.DONE, self)

    @property
    def progress(self) -> tuple[int, int]:
        """Steps and samples done so far, also of an attempt that raised."""
        if self._parts is None:
            return 0, 0
        return self._stepper.step_index, self._stepper.cursor.position

    @property
    def commits_together(self) -> bool:
        """All ranks of a declared training write their part of a commit."""
        return True

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        return self._stepper.settings

    @property
    def dials(self) -> Sequence[Dial]:
        """Share, batch and precision: a declared training has them all."""
        assert self._parts is not None
        return self._parts.dials

    def settle(self) -> None:
        """Wait until every step that was begun is over and recorded."""
        self._take(self._stepper.settle())

    def turned(self, asked: Settings, settings: Settings) -> str:
        """What there was no room for, where `settings` differ from those asked for."""
        reason = f"no room for micro-batch {asked.micro_batch} in {asked.tier}: goes on with {settings.micro_batch}"
        return f"{reason} x {settings.grad_accum} in {settings.tier}"

    @property
    def _stepper(self) -> Stepper:
        assert self._parts is not None, "made before anything is stepped or applied"
        return self._parts.stepper

    @property
    def _watched(self) -> PrecisionWatch:
        assert self._parts is not None, "made before anything is stepped or applied"
        return self._parts.watch

    @property
    def stepper(self) -> Stepper:
        """What makes the steps, once the course has begun."""
        return self._stepper

    def _train_to_report(self) -> Generator[Wait | Step, Any, bool]:
        """Step until the next report is due; False when told to leave before."""
        attempt, stepper = self.attempt, self._stepper
        target = (attempt.num_reports + 1) * self._trial.samples_per_report
        while stepper.cursor.position < target or self._settle_below(target):
            self._guard_precision()
            began_s, cpu_s = time.monotonic(), time.process_time()
            switch_s = attempt.cross(self)
            if attempt.is_paused:
                self.away()
            if attempt.is_told_to_leave or (attempt.is_paused and not (yield Wait(lambda: not attempt.is_paused))):
                return False
            stepper.offload.back()
            wait_s = attempt.share.hold_back()
            at_most = -(-(target - stepper.cursor.position) // self.settings.global_batch)
            stepped: Stepped = yield Step(max(1, at_most))
            times = Times(
                began_s=began_s,
                step_s=time.monotonic() - began_s,
                cpu_s=(time.process_time() - cpu_s) / max(1, stepped.num_together),
                wait_s=wait_s,
                switch_s=switch_s,
            )
            if stepped.move is not None:
                attempt.override(self, stepped.move)
            self._num_together = stepped.num_together
            self._launched += split(times, stepped) if stepped.num_together else [times]
            self._take(stepped.results)
        return True

    def away(self) -> None:
        """Give memory back while the trial waits without a share."""
        self.on_away()
        self._stepper.away()

    def advance(self) -> Stepped:
        """One more step of the trial alone; whoever watches the groups of several ranks sees how long it takes."""
        assert self._parts is not None
        self._ranks.stall.begin()
        try:
            results, move = self._parts.guard.advance()
        finally:
            self._ranks.stall.end()
            self._ranks.pulse.beat()
        return Stepped(results, move)

    def _settle_below(self, target: int) -> bool:
        """Wait for the steps on their way; whether that put the trial back below the target."""
        self.settle()
        return self._stepper.cursor.position < target

    def _take(self, results: list[StepResult]) -> None:
        """Record what came of steps; they come back in the order in which they began."""
        stepper = self._stepper
        for result in results:
            times = self._launched.popleft()
            self._record(result, times)
            if result.is_skipped:
                self._launched.clear()  # what was begun behind it did nothing
            self._protect(result, (times.step_s - times.wait_s) / result.num_steps)
        words = stepper.mode_words if results else ""
        if self._num_together and results:
            words = f"{results[-1].mode.value}, in a bundle"
        if words and words != self._mode_said:
            self._mode_said = words
            logger.info("step mode at step %d: %s", stepper.step_index, self._mode_said)
            measured = None if self._num_together else stepper.measured_mode
            if measured is not None and self.attempt.speaks:
                self.attempt.outbox.add_mode(measured)

    def _tell_dials(self) -> None:
        """Say what this training does not allow of its dials, if anything."""
        whole = self._stepper.whole
        if whole:
            logger.info("micro-batches stay at %d samples: %s", self._trial.start.micro_batch, whole)
            self.attempt.tell_dials(self)

    def _guard_precision(self) -> None:
        """Between two steps: make the move that a step asked for, and probe if it is time to."""
        if self._move is not None or self._watched.is_due:
            self.settle()
        move, self._move = self._move, None
        if move is not None and is_cheaper(self.settings.tier, move.tier):
            self._obey(move)
        with self._ranks.pulse.long("probing a tier") if self._watched.is_due else nullcontext():
            probed = self._watched.before_step()
        if probed is not None:
            self._obey(probed)
        self._tell_tiers()

    def _protect(self, result: StepResult, busy_s: float) -> None:
        """Let the guard judge a step; a trial whose gradient stays non-finite in its dearest tier is given up."""
        stepper, settings = self._stepper, self.settings
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

    def _obey(self, move: TierMove) -> None:
        """Make a protective move of the tier at once, inside the limits, and say so."""
        self._tell_tiers()
        stepper, settings, step = self._stepper, self.settings, self._stepper.step_index
        self._is_rolled_back |= move.is_rollback and self._watched.go_back()
        stepper.turn(replace(settings, tier=move.tier))
        self._watched.turned()
        back = f"back to step {stepper.step_index}, " if stepper.step_index != step else ""
        reason = f"{move.reason}: {back}goes on in {move.tier}"
        is_lasting = not self._watched.is_probing
        self.attempt.override(self, Move(instead_of=settings, reason=reason), is_lasting=is_lasting)

    def _tell_tiers(self) -> None:
        """Pass on what is newly known of the tiers."""
        tiers = self._watched.news()
        if tiers is not None and self.attempt.speaks:
            report = TierReport(step=self._stepper.step_index, tiers=tiers, spent_s=self._watched.spent_s)
            self.attempt.outbox.add_tiers(report)

    def _watch_plan(self) -> WatchPlan:
        trial, ranks, directory = self._trial, self._ranks, self.attempt.directory
        fixed = [
            f"{param.name}={trial.params[param.name]}"
            for param in job_info(trial.job).params
            if param.changes_speed and param.name in trial.params
        ]
        return WatchPlan(
            ladder=(trial.start.tier,) if self._job.has_own_step else trial.limits.tiers,
            budget=0.0 if self._job.has_own_step else trial.probe_budget,
            target_samples=trial.samples_per_report * trial.max_reports,
            key=calibration_key(trial.job, fixed, trial.start.micro_batch, ranks.world_size, ranks.device),
            # Beside the runs, so that the next run of the same shape need not measure again.
            cache=directory.parents[2] / ".calibration" if len(directory.parents) > 2 else None,
        )

    def _report(self) -> Generator[Wait | Step, Any, bool]:
        """Evaluate, commit, tell the search, and wait for its word to go on; False when told to leave."""
        attempt = self.attempt
        metrics = self._evaluate()
        path = self._commit(attempt.num_reports + 1)
        if path is None:
            return False
        attempt.report(self, metrics, path)
        self._watched.committed()
        if attempt.num_reports >= self._trial.max_reports:
            return True
        is_to_go_on: bool = yield Wait(attempt.has_credit)
        return is_to_go_on

    def _evaluate(self) -> dict[str, float]:
        """Validation metrics; an evaluation that runs out of memory is begun again with the trial, from its commit."""
        try:
            return self._stepper.evaluate()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            text = f"{self._trial.trial_id} ran out of memory in its evaluation: {error}"
            raise OutOfMemoryError(text, settings=self.settings) from None

    def _leave(self) -> Outcome:
        """Do what the order to stop asks for."""
        attempt = self.attempt
        self.settle()
        self._stepper.offload.back()
        if attempt.order.stop.commits:
            path = self._commit(attempt.num_reports) if attempt.grant is not None else None
            if not attempt.order.stop.commits:  # said while it waited for room
                return attempt.outcome(Status.STOPPED, self)
            return attempt.outcome(Status.INTERRUPTED, self, path)
        return attempt.outcome(Status.STOPPED, self)

    def _commit(self, num_reports: int) -> Path | None:
        """Write a commit, once there is room; None where the trial was told to leave without one meanwhile."""
        extra, directory = {"num_reports": num_reports, "guard": self._watched.guard.state()}, self.attempt.directory
        return self.attempt.when_room(lambda: self._stepper.commit(directory / "checkpoints", extra), self)

    def _record(self, result: StepResult, times: Times) -> None:
        """Append this step's telemetry."""
        settings = self.settings
        flags = FLAG_SKIPPED if result.is_skipped else 0
        flags |= FLAG_GRAPH if result.mode.is_replayed else 0
        flags |= FLAG_COMPILED if result.mode is StepMode.COMPILED else 0
        flags |= 0 if self._num_together or self._stepper.is_settled_on(result.mode) else FLAG_UNSETTLED
        flags |= FLAG_ROLLED_BACK if self._is_rolled_back else 0
        flags |= FLAG_SEVERAL if result.num_steps > 1 else 0
        flags |= FLAG_BUNDLE if self._num_together > 1 else 0
        self._is_rolled_back = False
        memory_bytes = self._meter.observe(settings) // max(1, self._num_together)
        self.attempt.record(result, times, flags=flags, memory_bytes=memory_bytes, settings=settings)


def split(times: Times, stepped: Stepped) -> list[Times]:
    """The times of steps that were told of together, for each of their results by its steps."""
    total, found, began_s = sum(result.num_steps for result in stepped.results), [], times.began_s
    for result in stepped.results:
        part = result.num_steps / total
        step_s = times.step_s * part
        found.append(replace(times, began_s=began_s, step_s=step_s, cpu_s=times.cpu_s * part))
        times, began_s = replace(times, wait_s=0.0, switch_s=0.0), began_s + step_s
    return found


class _Parts:
    """What an attempt of a declared training is made of, once its model is built."""

    def __init__(self, attempt: Attempt, stepper: Stepper, meter: MemoryMeter, plan: WatchPlan) -> None:
        ranks, trial = attempt.ranks, attempt.trial
        self.stepper = stepper
        self.guard = MemoryGuard(stepper, ranks, meter, trial.trial_id)
        self.watch = PrecisionWatch(plan, stepper, ranks.device, ranks.group)
        self.dials: tuple[Dial, ...] = (
            ShareDial(attempt.share, ranks.rank, trial.start),
            BatchDial(stepper, self.guard, trial.start),
            PrecisionDial(stepper, self.watch, trial.start),
        )
