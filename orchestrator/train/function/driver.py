"""The driver of a user's function: runs it, and takes what it does as the steps and reports of an attempt.

A step of the first optimizer ends at a step boundary: there the function waits for its share, new dials are applied,
and it leaves if it was told to, by an exception that no `except Exception` catches.
"""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from orchestrator.control.orders import Outcome, SlotOrder, Status
from orchestrator.errors import FunctionError
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import is_cheaper
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.telemetry.record import FLAG_UNSETTLED
from orchestrator.train.attempt import Attempt, Times
from orchestrator.train.batch.guard import Move
from orchestrator.train.batch.learning_rate import scaled
from orchestrator.train.batch.memory import MemoryMeter
from orchestrator.train.boundary import Boundary
from orchestrator.train.dials.dial import Dial
from orchestrator.train.dials.share import ShareDial
from orchestrator.train.function import adapters, autocast, commits
from orchestrator.train.function.autocast import Autocast
from orchestrator.train.function.batch import LoaderBatch, Loaders
from orchestrator.train.function.current import TrialInfo, running_as
from orchestrator.train.function.hooks import Steps
from orchestrator.train.function.noise import StepPairs
from orchestrator.train.function.offers import Offers
from orchestrator.train.function.workplace import WORK, working_directory
from orchestrator.train.groups import Ranks
from orchestrator.train.link import Link
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_result import StepResult

logger = logging.getLogger(__name__)

RESUMED = "resumed"
"""Where a function finds the files of its newest checkpoint, below its trial's directory."""

UNSETTLED_STEPS = 3
"""Steps at the beginning, and behind a report, whose times say nothing of the speed: caches and memory are filled."""


class _Leave(BaseException):
    """Unwinds a function that was told to leave; not an Exception, so that its own handlers let it pass."""


class _Done(BaseException):
    """Unwinds a function that made its last report."""


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
        self._steps = Steps(self._stepped, self._about_to_step)
        self._noise = StepPairs()
        self._loaders = Loaders()
        self._share = ShareDial(share, ranks.rank, trial.start)
        self._batch = LoaderBatch(self._loaders, trial.start, is_alone=ranks.world_size == 1)
        self._precision = Autocast(ranks.device, trial.start)
        self._settings = trial.start
        self._step = self._position = 0
        self._is_leaving = False
        self._num_unsettled = UNSETTLED_STEPS
        self._pending: list[tuple[StepResult, Times, int, Settings, _Loss | None]] = []
        self._began_s = self._began_cpu_s = 0.0
        self._wait_s = self._switch_s = 0.0
        self._checkpoint: Path | None = None
        self.offers = Offers(trial.metric, self._take_report)

    def run(self) -> Outcome:
        """Call the function, and return how the attempt ended when it has returned or left.

        Raises:
            FunctionError: it returned without a report, or reported what the search cannot use.
            Exception: whatever the function raises.
        """
        attempt = self.attempt
        if attempt.trial.resume_from is not None:
            self._resume(Path(attempt.trial.resume_from))
            attempt.resumed(self)
        elif attempt.trial.attempt:
            attempt.num_reports = 0  # it begins anew; reports that were taken already are not made again
            logger.info("no checkpoint was reported: the function begins anew")
        with contextlib.ExitStack() as stack:
            stack.callback(self._precision.restore)
            try:
                attempt.follow(None, self)
                self._wait(lambda: attempt.grant is not None and not attempt.is_paused)
                stack.enter_context(working_directory(attempt.directory / WORK))
                stack.enter_context(self._steps.installed())
                stack.enter_context(self._loaders.installed())
                stack.enter_context(adapters.installed(self))
                stack.enter_context(running_as(self))
                attempt.tell_dials(self)
                self._begin_step()
                self._function()
                self.offers.settle()
            except _Done:
                return self._ended(Status.DONE)
            except _Leave:
                pass
            except Exception:
                if not self._is_leaving:
                    raise
                logger.info("the function raised while it was leaving", exc_info=True)
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
        self._record_pending(0)

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
        values = self._numbers(metrics)
        self.settle()
        path = None if checkpoint is None else self._commit(checkpoint)
        if attempt.num_reports < attempt.trial.num_reports_done:
            attempt.num_reports += 1  # of an earlier attempt, made again
        else:
            attempt.report(self, values, path)
            if attempt.num_reports >= attempt.trial.max_reports:
                self._is_leaving = True
                raise _Done
            self._wait(lambda: attempt.order.credit > attempt.num_reports)
        self._num_unsettled = max(self._num_unsettled, 1)
        self._begin_step()

    @property
    def checkpoint(self) -> Path | None:
        """A copy of the newest checkpoint's files, None where none was reported."""
        return self._checkpoint

    @property
    def info(self) -> TrialInfo:
        """The trial as its function sees it."""
        trial, directory = self.attempt.trial, self.attempt.directory
        return TrialInfo(
            trial_id=trial.trial_id,
            run=directory.parents[1].name,
            directory=directory,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            attempt=trial.attempt,
        )

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
        if not self._batch.why_off:
            self._noise.before(optimizer, self._step)

    def _stepped(self, _optimizer: Optimizer) -> None:
        """The first optimizer has made a step: record it, and cross the boundary behind it."""
        attempt, now_s = self.attempt, time.monotonic()
        self._ranks.pulse.beat()
        num_backwards, loss = self._steps.num_backwards, self._steps.take_loss()
        self._look_at_dials(num_backwards)
        settings = self._batch.label(self._settings)
        times = Times(
            began_s=self._began_s,
            step_s=now_s - self._began_s,
            cpu_s=time.process_time() - self._began_cpu_s,
            wait_s=self._wait_s,
            switch_s=self._switch_s,
        )
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
        flags = FLAG_UNSETTLED if self._num_unsettled else 0
        self._num_unsettled -= bool(self._num_unsettled)
        self._pending.append((result, times, flags, settings, None if loss is None else _Loss(loss)))
        self._step += 1
        self._position += result.num_samples
        self._record_pending(0 if self._ranks.device.type == "cpu" else 2)
        self._begin_step(is_step=True)
        self._switch_s = attempt.cross(self)
        self._wait(lambda: not attempt.is_paused)
        self._wait_s = attempt.share.hold_back()

    def _begin_step(self, *, is_step: bool = False) -> None:
        """Time the next step from here on."""
        self._began_s, self._began_cpu_s = time.monotonic(), time.process_time()
        if not is_step:
            self._wait_s = self._switch_s = 0.0

    def _wait(self, is_met: Callable[[], bool]) -> None:
        """Wait at a boundary.

        Raises:
            _Leave: the trial was told to.
        """
        if not self.attempt.wait_until(is_met, self):
            self._is_leaving = True
            raise _Leave

    def turned(self, asked: Settings, settings: Settings) -> str:
        """The dials are set so from the next step on; the learning rate follows the batch."""
        self._settings = settings
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
        why = self._why_own_precision()
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

    def _why_own_precision(self) -> str:
        if self._steps.scales_loss:
            return autocast.SCALER
        if self._steps.casts:
            return autocast.OWN
        return autocast.LINE_SEARCH if isinstance(self._steps.first, torch.optim.LBFGS) else ""

    def _own_words(self, asked: Settings) -> str:
        """What the function does by itself where it was asked for something else."""
        now = self._settings
        words = f"the function's own batch is {now.micro_batch}" + (
            f" x {now.grad_accum}" if now.grad_accum > 1 else ""
        )
        return words if asked.tier is now.tier else f"{words}, and {self._precision.why_off}"

    def _record_pending(self, num_left: int) -> None:
        """Record all but the newest steps; reading a loss waits for the device to have computed it."""
        while len(self._pending) > num_left:
            result, times, flags, settings, loss = self._pending.pop(0)
            value = math.nan if loss is None else loss.read()
            result = replace(result, loss=value, is_loss_finite=loss is None or math.isfinite(value))
            memory_bytes = self._meter.observe(settings)
            self.attempt.record(result, times, flags=flags, memory_bytes=memory_bytes, settings=settings)
            if not result.is_loss_finite:
                self._protect(result)

    def _protect(self, result: StepResult) -> None:
        """A loss that is not finite in a cheaper tier: compute in the dearest one from here on."""
        dearest, now = self.attempt.trial.limits.tiers[0], self._settings
        if self._precision.why_off or not is_cheaper(now.tier, dearest):
            return
        self._precision.set(dearest)
        self._settings = replace(now, tier=dearest)
        reason = f"the loss of step {result.step} is {result.loss} in {now.tier}: goes on in {dearest}"
        self.attempt.override(self, Move(instead_of=now, reason=reason))

    # Reports and checkpoints.

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The values that are numbers; the search's own must be one.

        Raises:
            FunctionError: it is not, or is missing.
        """
        metric = self.attempt.trial.metric
        values = {str(key): float(value) for key, value in metrics.items() if _is_number(value)}
        if metric and metric not in values:
            if metric in metrics:
                kind = type(metrics[metric]).__name__
                raise FunctionError(f"search.metric {metric!r} was reported as a {kind}; allowed: a number")
            names = ", ".join(sorted(map(str, metrics))) or "nothing"
            raise FunctionError(
                f"search.metric {metric!r} is not among the reported values ({names}); report it, or name one of these"
            )
        return values

    def _commit(self, source: Path) -> Path | None:
        """Keep a reported checkpoint; rank 0's counts."""
        if not self.attempt.speaks:
            return None
        extra = {
            "step": self._step,
            "position": self._position,
            "num_reports": self.attempt.num_reports + 1,
            "kind": "function",
        }
        directory = self.attempt.directory / "checkpoints"
        path = self.attempt.when_room(lambda: commits.commit(directory, source, extra), self)
        if path is None:
            self._is_leaving = True
            raise _Leave
        return path

    def _resume(self, path: Path) -> None:
        extra = commits.extra_of(path)
        self._step, self._position = int(extra["step"]), int(extra["position"])
        self.attempt.num_reports = int(extra["num_reports"])
        self._checkpoint = commits.take_out(path, self.attempt.directory / RESUMED)
        logger.info("the function goes on from its checkpoint of step %d", self._step)

    def _ended(self, status: Status) -> Outcome:
        self.settle()
        return self.attempt.outcome(status, self)


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, numbers.Real) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)


class _Loss:
    """The loss of a step, on its way from the device: `read` waits for that step only, not for later ones."""

    def __init__(self, loss: Tensor) -> None:
        self._value, self._copied = loss, None
        if loss.device.type == "cuda":
            self._value = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self._value.copy_(loss, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> float:
        """Its value."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
