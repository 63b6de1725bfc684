"""The driver of a user's function: runs it, and takes what it does as the steps and reports of an attempt.

A step of the first optimizer ends at a step boundary: there the function waits for its share, new dials are applied,
and it leaves if it was told to, by an exception that no `except Exception` catches.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from orchestrator.control.orders import Outcome, SlotOrder, Status, StopMode
from orchestrator.errors import FunctionError, TierError
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.train.attempt import Attempt
from orchestrator.train.batch.guard import Move
from orchestrator.train.batch.learning_rate import scaled
from orchestrator.train.batch.memory import MemoryMeter
from orchestrator.train.boundary import Boundary
from orchestrator.train.dials.dial import Dial
from orchestrator.train.dials.share import ShareDial
from orchestrator.train.function import adapters, watched
from orchestrator.train.function.autocast import Autocast
from orchestrator.train.function.batch import LoaderBatch, Loaders
from orchestrator.train.function.blame import TierBlame
from orchestrator.train.function.commits import Commits
from orchestrator.train.function.current import TrialInfo, running_as
from orchestrator.train.function.endings import Done, Leave, Spoilt
from orchestrator.train.function.guard import SpoiltError, TierGuard
from orchestrator.train.function.hooks import Steps
from orchestrator.train.function.noise import FunctionNoise
from orchestrator.train.function.offers import Offers
from orchestrator.train.function.pending import Made, Pending, StepClock
from orchestrator.train.function.values import numbers_in
from orchestrator.train.function.watched import Watched
from orchestrator.train.function.workplace import WORK, working_directory
from orchestrator.train.groups import Ranks
from orchestrator.train.link import Link
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_result import StepResult

logger = logging.getLogger(__name__)


class FunctionDriver:
    """One attempt of a user's function on one rank.

    Args:
        order: the newest order, with the trial.
        function: called without arguments; trains until it returns.
        ranks: where this process stands in its worker group.
        boundary: how the ranks learn of new orders.
        link: the outside.
        share: what holds this process to its share.
    """

    def __init__(
        self,
        order: SlotOrder,
        function: Callable[[], object],
        ranks: Ranks,
        boundary: Boundary,
        link: Link,
        share: ShareMechanism,
    ) -> None:
        self.attempt = Attempt(order, ranks, boundary, link, share)
        self._function, self._ranks = function, ranks
        trial = self.attempt.trial
        self._meter = MemoryMeter(ranks.device, trial.memory_bytes)
        self._steps = Steps(self._stepped, self._about_to_step, self._computed)
        self._noise = FunctionNoise()
        self._loaders = Loaders()
        self._share = ShareDial(share, ranks.rank, trial.start)
        self._batch = LoaderBatch(self._loaders, trial.start, num_ranks=ranks.world_size)
        self._precision = Autocast(ranks.device, trial.start, why_off=trial.precision_off)
        self._blame = TierBlame(trial.start.tier)
        self._settings = trial.start
        self._step = self._position = 0
        self._is_leaving = False
        self._pending = Pending(num_late=0 if ranks.device.type == "cpu" else 2)
        self._guard = TierGuard(self.attempt, self._precision, self)
        self._watched: Watched | None = None
        self._commits = Commits(self.attempt.directory, ranks.rank)
        self._clock = StepClock()
        self.offers = Offers(trial.metric, self._take_report)

    def run(self) -> Outcome:
        """Call the function, and return how the attempt ended when it has returned or left.

        Raises:
            FunctionError: it returned without a report, or reported what the search cannot use.
            TierError: it raised in a cheaper tier than it began in, which may be why.
            OutOfMemoryError: memory ran out with a larger batch than its own.
            Exception: whatever else the function raises.
        """
        attempt = self.attempt
        if attempt.trial.resume_from is not None:
            self._resume(Path(attempt.trial.resume_from))
            attempt.resumed(self)
        elif attempt.trial.attempt:
            attempt.num_reports = 0  # it begins anew; reports that were taken already are not made again
            logger.info("no checkpoint was reported: the function begins anew")
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore)
            try:
                self._call(stack)
            except Done:
                return self._ended(Status.DONE)
            except Leave:
                pass
            except Spoilt as spoilt:
                raise TierError(str(spoilt)) from None
            except Exception as error:
                if not self._is_leaving:
                    self._batch.judge(error, self._settings)
                    self._blame.judge(error)
                logger.info("the function raised while it was leaving", exc_info=error)
            if attempt.is_told_to_leave:
                commits_first = attempt.order.stop.commits
                return self._ended(Status.INTERRUPTED if commits_first else Status.STOPPED)
        if not attempt.num_reports:
            names = ", ".join(sorted(self.offers.other_names))
            raise FunctionError(
                f"the function returned without a report of {attempt.trial.metric!r}; call"
                " orchestrator.report({...}), ray.tune.report or ray.train.report at least once"
                + (f", or name one that its library makes: {names}" if names else "")
            )
        return self._ended(Status.DONE)

    def _call(self, stack: contextlib.ExitStack) -> None:
        """Wait for the first grant, and call the function with everything installed that sees and changes it."""
        attempt = self.attempt
        attempt.follow(None, self)
        self._wait(lambda: attempt.grant is not None and not attempt.is_paused)
        stack.enter_context(working_directory(attempt.directory / WORK))
        stack.enter_context(self._steps.installed())
        stack.enter_context(self._loaders.installed())
        stack.enter_context(adapters.installed(self))
        stack.enter_context(running_as(self))
        attempt.tell_dials(self)
        self._clock.begin()
        self._function()
        self.offers.settle()

    # What an attempt asks of its driver.

    @property
    def progress(self) -> tuple[int, int]:
        """Steps of the first optimizer, and samples of its loader (steps, where there is no loader)."""
        return self._step, self._position

    @property
    def commits_together(self) -> bool:
        """Rank 0 alone keeps what it reports."""
        return False

    @property
    def settings(self) -> Settings:
        """The dials in force; the batch is what the function trains with."""
        return self._settings

    @property
    def dials(self) -> Sequence[Dial]:
        """Share, batch and precision, as far as this function allows them."""
        return self._share, self._batch, self._precision

    def settle(self) -> None:
        """Record the steps whose losses are still on the device."""
        self._record(all_of_them=True)

    # What a running function asks for: see `current.Running`.

    def report(self, metrics: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Take a report: keep its checkpoint, tell the search, and wait for its word.

        Raises:
            FunctionError: the metric of the search is missing, or no number.
        """
        self.offers.stand_back()
        self._take_report(metrics, checkpoint)

    def _take_report(self, metrics: Mapping[str, Any], checkpoint: Path | None) -> None:
        attempt = self.attempt
        values = numbers_in(metrics, attempt.trial.metric)
        self.settle()
        if attempt.trial.metric:
            self._guard.take_report(self._settings.tier, attempt.trial.metric, values[attempt.trial.metric])
        path = self._commit(checkpoint)
        self._guard.committed()
        self._blame.reported(self._settings.tier)
        if attempt.num_reports < attempt.trial.num_reports_done:
            attempt.num_reports += 1  # of an earlier attempt, made again
        else:
            attempt.report(self, values, path)
            if attempt.num_reports >= attempt.trial.max_reports:
                self._is_leaving = True
                raise Done
            self._wait(lambda: attempt.order.credit > attempt.num_reports)
        self._clock.begin_anew()

    @property
    def checkpoint(self) -> Path | None:
        """A copy of the newest checkpoint's files, None where none was reported."""
        return self._commits.checkpoint

    @property
    def num_reports(self) -> int:
        """Reports made, those of earlier attempts included from whose state this one goes on."""
        return self.attempt.num_reports

    @property
    def info(self) -> TrialInfo:
        """The trial as its function sees it."""
        return TrialInfo.of(self.attempt.trial, self.attempt.directory, self._ranks)

    def watch(self, model: object, optimizer: object, loader: object) -> None:
        """Take a model, its optimizer and its loader: keep their state, and probe precision tiers.

        Raises:
            FunctionError: they cannot be watched.
        """
        watched.check(model, optimizer, loader, self._watched)
        if isinstance(optimizer, Optimizer):
            self._steps.first = optimizer
        if isinstance(loader, DataLoader):
            self._loaders.only = loader
        if self._watched is not None:
            return
        assert isinstance(model, torch.nn.Module)
        given = optimizer if isinstance(optimizer, Optimizer) else None
        self._watched = Watched(model, given, self._precision, self)
        if self._commits.watched is not None:
            self._watched.load(self._commits.watched)
            logger.info("the watched model goes on from step %d and report %d", self._step, self.attempt.num_reports)
        self._guard.watch(self._watched)
        self.attempt.tell_dials(self)

    # What a library adapter asks for besides: see `adapters.Host`.

    def hold_batch(self, why: str) -> None:
        """The batch stays as it is, for a reason that the library gives."""
        self._batch.hold(why)

    def freeze_batch(self, *, is_frozen: bool) -> None:
        """Whether the batch may change only where a loader is begun anew."""
        self._loaders.is_frozen = is_frozen

    def begin_epoch(self, loader: Any) -> bool:
        """Let the batch that was asked for in the last epoch begin; True if it is another one."""
        is_news = self._batch.begin_epoch(loader)
        if is_news:
            self._follow_batch()
        return is_news

    # Steps.

    def _about_to_step(self, optimizer: Optimizer) -> None:
        """Where the batch may turn, see from time to time what a larger one would gain."""
        if self._watched is not None:
            self._watched.takes(optimizer)
        if optimizer is self._steps.first and not self._batch.why_off and self._batch.own.grad_accum == 1:
            self._noise.before(optimizer, self._step)

    def _computed(self, num_backwards: int) -> None:
        """A backward pass is over: of several in a step, halves say what a larger batch would gain."""
        first, parts = self._steps.first, self._batch.own.grad_accum
        if first is not None and parts > 1 and not self._batch.why_off and not self._steps.scales_loss:
            self._noise.behind(first, self._step, num_backwards, (parts, self._batch.now))

    def _stepped(self, _optimizer: Optimizer) -> None:
        """The first optimizer has made a step: record it, and cross the boundary behind it."""
        attempt, (times, flags) = self.attempt, self._clock.end()
        self._ranks.pulse.beat()
        num_backwards, loss = self._steps.num_backwards, self._steps.take_loss()
        self._look_at_dials(num_backwards)
        settings = self._batch.label(self._settings)
        result = StepResult(
            step=self._step,
            position=self._position,
            mode=StepMode.EAGER,
            is_skipped=False,
            num_samples=self._batch.num_samples,
            loss=math.nan,
            grad_norm=math.nan,
            learning_rate=self._steps.learning_rate,
            noise=self._noise.take(self._batch.num_samples),
            data_s=0.0,
        )
        self._pending.add(Made(result=result, times=times, flags=flags, settings=settings), loss)
        self._step += 1
        self._position += result.num_samples
        self._record()
        try:
            self._guard.between_steps()
        except SpoiltError as error:
            self._is_leaving = True
            raise Spoilt(str(error)) from None
        self._clock.begin()
        self._clock.switch_s = attempt.cross(self)
        self._wait(lambda: not attempt.is_paused)
        self._clock.wait_s = attempt.share.hold_back()

    def _wait(self, is_met: Callable[[], bool]) -> None:
        """Wait at a boundary.

        Raises:
            Leave: the trial was told to.
        """
        if not self.attempt.wait_until(is_met, self):
            self._is_leaving = True
            raise Leave

    def turned(self, asked: Settings, settings: Settings) -> str:
        """The dials are set so from the next step on; the learning rate follows the batch."""
        self._settings = settings
        self._blame.turned(settings.tier)
        self._noise.turned()
        self._guard.turned()
        self._follow_batch()
        return self._own_words(asked)

    def _follow_batch(self) -> None:
        """The learning rate of the batch that the next step is made of."""
        if not self._batch.why_off:
            own = self._batch.own
            now = replace(own, micro_batch=self._batch.now).global_batch
            self._steps.factor = scaled(1.0, self._steps.rule, own.global_batch, now)

    def _look_at_dials(self, num_backwards: int) -> None:
        """See what the function turned out to be; say so once it is known, and what it trains with instead."""
        own, batch, before = self._precision, self._batch, self._settings
        is_news = batch.stepped(num_backwards=num_backwards, counts_steps=lambda: self._steps.counts_steps)
        why = self._steps.own_precision
        if why and not own.why_off:
            own.leave_alone(why)
            is_news = True
        if not is_news:
            return
        tier = self.attempt.trial.start.tier if own.why_off else before.tier
        self._settings = replace(before, micro_batch=batch.now, grad_accum=batch.own.grad_accum, tier=tier)
        self.attempt.tell_dials(self)
        if self._settings != before:
            move = Move(instead_of=before, reason=self._own_words(before))
            self.attempt.override(self, move, is_lasting=False)

    def _own_words(self, asked: Settings) -> str:
        """What the function does by itself where it was asked for something else."""
        now = self._settings
        words = f"the function's own batch is {now.micro_batch}" + (
            f" x {now.grad_accum}" if now.grad_accum > 1 else ""
        )
        return words if asked.tier is now.tier else f"{words}, and {self._precision.why_off}"

    def _record(self, *, all_of_them: bool = False) -> None:
        """Record the steps that are over, and let the guard judge them."""
        for made in self._pending.take(all_of_them=all_of_them):
            memory_bytes = self._meter.observe(made.settings)
            self.attempt.record(
                made.result, made.times, flags=made.flags, memory_bytes=memory_bytes, settings=made.settings
            )
            self._guard.after_step(made)

    # What the guard of the precision asks for: see `guard.Protected`.

    @property
    def part_done(self) -> float:
        """Part of the trial that is done, as far as the number of its reports says."""
        return self.attempt.num_reports / self.attempt.trial.max_reports

    def change_tier(self, tier: Tier, reason: str, *, is_lasting: bool) -> None:
        """Compute in `tier` from the next step on, and say why."""
        before = self._settings
        self._precision.set(tier)
        self._settings = replace(before, tier=tier)
        self._guard.turned()
        self._noise.turned()
        self.attempt.override(self, Move(instead_of=before, reason=reason), is_lasting=is_lasting)

    def give_precision_up(self, why: str) -> None:
        """Compute in the start tier, for good."""
        before, start = self._settings.tier, self.attempt.trial.start.tier
        self._precision.leave_alone(why)
        self.attempt.tell_dials(self)
        if before is not start:
            self.change_tier(start, why, is_lasting=False)

    # Reports and checkpoints.

    def _commit(self, checkpoint: Path | None) -> Path | None:
        """Keep what a report brought, once there is room; None where there is nothing to keep.

        Raises:
            Leave: the search has no further use for the trial, said while it waited for room.
        """
        attempt, number = self.attempt, self.attempt.num_reports + 1
        place = {"step": self._step, "position": self._position, "num_reports": number, "guard": self._guard.state()}
        path = attempt.when_room(lambda: self._commits.commit(checkpoint, self._watched, place), self)
        if path is None and attempt.order.stop is StopMode.DISCARD:
            self._is_leaving = True
            raise Leave
        return path

    def _resume(self, path: Path) -> None:
        extra = self._commits.resume(path)
        self._step, self._position = int(extra["step"]), int(extra["position"])
        self.attempt.num_reports = int(extra["num_reports"])
        self._guard.kept = extra.get("guard")
        logger.info("the function goes on from its checkpoint of step %d", self._step)

    def _restore(self) -> None:
        self._precision.restore()
        if self._watched is not None:
            self._watched.close()

    def _ended(self, status: Status) -> Outcome:
        self.settle()
        self._guard.close()
        return self.attempt.outcome(status, self)
