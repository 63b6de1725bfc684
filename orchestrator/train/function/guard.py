"""The guard of a function's precision: protects it from a cheaper tier that harms it.

Without a watched model only what is not finite counts, as in declared trainings without probes: the trial goes on in
the dearest tier, and where its losses stay not finite there it begins again in its start tier, since its weights are
gone. With one, `precision.watch` calibrates and probes tiers on kept calls, and puts weights back that a tier spoilt.
Called by the driver at each boundary, and with each step once its loss is known.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist

from orchestrator.control.orders import TierReport
from orchestrator.jobs.own import last_line_of
from orchestrator.policies.tier import Tier, is_cheaper
from orchestrator.train.attempt import Attempt
from orchestrator.train.function.autocast import Autocast, is_compiled
from orchestrator.train.function.pending import Made
from orchestrator.train.function.watched import Standing, Watched
from orchestrator.train.precision.calibrate import calibration_key
from orchestrator.train.precision.guard import Cause, Move
from orchestrator.train.precision.watch import PrecisionWatch, StepNews, WatchPlan

MAX_SPOILT = 3
"""Losses in a row that are not finite in the dearest tier, after a cheaper one, until the attempt is given up."""


class SpoiltError(Exception):
    """A cheaper tier has spoilt the weights."""


class Protected(Standing, Protocol):
    """Whose tier is guarded: the driver."""

    def change_tier(self, tier: Tier, reason: str, *, is_lasting: bool) -> None:
        """Compute in `tier` from the next step on, and say why."""
        ...

    def give_precision_up(self, why: str) -> None:
        """Compute in the start tier, for good."""
        ...


class TierGuard:
    """The guard of one attempt. One rank judges by probes; several only by what is not finite.

    Attributes:
        kept: the state of the guard of an earlier attempt, whose bans hold on; None where there is none.
    """

    def __init__(self, attempt: Attempt, precision: Autocast, host: Protected) -> None:
        self._attempt, self._precision, self._host = attempt, precision, host
        self._dearest = attempt.trial.limits.tiers[0]
        self._watch: PrecisionWatch | None = None
        self._watched: Watched | None = None
        self._has_begun = self._is_new = False
        self._was_cheaper = False
        self._num_spoilt = 0
        self._move: Move | None = None
        self._is_bad = False
        self.kept: dict[str, Any] | None = None
        self._posted: tuple[dist.Work, torch.Tensor] | None = None

    def watch(self, watched: Watched) -> None:
        """Probe with that model from here on, where one rank has it; a compiled one would be compiled for each tier."""
        ranks = self._attempt.ranks
        if ranks.world_size == 1 and not self._precision.why_off and not is_compiled(watched.model):
            self._watched = watched
            self._watch = PrecisionWatch(self._plan(watched), watched, ranks.device, None)
            self._watch.guard.restore(self.kept)
            self._is_new = True
            self._tell()

    def state(self) -> dict[str, Any] | None:
        """What a commit keeps; None where nothing is probed."""
        return self.kept if self._watch is None else self._watch.guard.state()

    @property
    def is_probing(self) -> bool:
        """Whether probes decide which tiers are safe."""
        return self._watch is not None and self._watch.is_probing

    def between_steps(self) -> None:
        """Make the move that a step or a report asked for, and probe if it is time to.

        Raises:
            SpoiltError: the weights are not finite any more, and no copy of them is there.
        """
        if self._precision.why_off:
            return
        if self._attempt.ranks.world_size > 1 and self._was_cheaper:
            self._judge(self._host.settings.tier, is_bad=self._agreed(), what="the loss of a step is not finite")
        if self._num_spoilt >= MAX_SPOILT:
            tier = self._host.settings.tier
            raise SpoiltError(f"its losses were not finite in a cheaper tier, nor in {tier} behind it")
        try:
            move = self._next_move()
        except Exception as error:  # the model is the user's: what it raises when it is computed again is no end
            self._host.give_precision_up(f"its model cannot be computed again: {last_line_of(error)}")
            return
        if move is not None and is_cheaper(self._host.settings.tier, move.tier):
            self._obey(move)
        self._tell()

    def _next_move(self) -> Move | None:
        move, self._move = self._move, None
        watch, watched = self._watch, self._watched
        if move is not None or watch is None or watched is None or not watch.is_probing:
            return move
        watched.calls.end_step()
        if self._has_begun and not watch.is_due:
            return watch.before_step()  # which counts what falls out of a tier's range
        if not watched.is_ready:
            watched.calls.arm()
            return None
        with watched.gradients_kept():
            if not self._has_begun:
                watch.begin()
                self._has_begun = True
            else:
                move = watch.before_step()
        watched.calls.drop()
        return move

    def after_step(self, made: Made) -> None:
        """Judge a step; the move that follows is made at the next boundary."""
        if self._precision.why_off:
            return
        result, is_bad = made.result, not made.result.is_loss_finite
        if self._attempt.ranks.world_size > 1:
            self._is_bad |= is_bad and self._was_cheaper
            return
        if self._watch is not None:
            news = StepNews(
                is_skipped=is_bad,
                is_loss_finite=not is_bad,
                loss=result.loss,
                loss_scale=1.0,
                busy_s=made.times.step_s - made.times.wait_s,
            )
            self._move = self._watch.after_step(news) or self._move
        self._judge(made.settings.tier, is_bad=is_bad, what=f"the loss of step {result.step} is {result.loss}")

    def take_report(self, tier: Tier, name: str, value: float) -> None:
        """Judge the metric of a report as well: a training may look at its losses by itself."""
        if math.isfinite(value) or self._precision.why_off:
            return
        if self._attempt.ranks.world_size > 1:
            self._is_bad |= self._was_cheaper
        elif is_cheaper(tier, self._dearest):
            self._judge(tier, is_bad=True, what=f"{name} was reported as {value}")

    def close(self) -> None:
        """Finish what is posted; called by every rank before the group is used for something else."""
        if self._posted is not None:
            self._posted[0].wait()
            self._posted = None

    def _judge(self, tier: Tier, *, is_bad: bool, what: str) -> None:
        """Flee from a cheaper tier in which something was not finite; count what is so behind that as well."""
        self._num_spoilt = self._num_spoilt + 1 if is_bad and self._was_cheaper and tier is self._dearest else 0
        if is_bad and is_cheaper(tier, self._dearest):
            reason = f"{what} in {tier}"
            self._move = Move(tier=self._dearest, cause=Cause.NON_FINITE, reason=reason, is_rollback=True)

    def _agreed(self) -> bool:
        """Whether something was not finite on any rank at the boundary before this one; nobody waits for the answer."""
        before = False
        if self._posted is not None:
            work, told = self._posted
            work.wait()
            before = bool(told.item())
        told, self._is_bad = torch.tensor([int(self._is_bad)]), False
        posted = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._attempt.ranks.group, async_op=True)
        assert posted is not None
        self._posted = posted, told
        return before

    def _obey(self, move: Move) -> None:
        """Turn the tier as a move says, and put back what the tier before has spoilt, if a copy is there."""
        self._tell()
        reason = f"{move.reason}: goes on in {move.tier}"
        self._host.change_tier(move.tier, reason, is_lasting=not self.is_probing)
        if move.is_rollback and self._watch is not None and self._has_begun:
            self._watch.go_back()

    def turned(self) -> None:
        """The dials changed."""
        self._was_cheaper |= is_cheaper(self._host.settings.tier, self._dearest)
        if self._watch is not None:
            self._watch.turned()
        if self._watched is not None:
            self._watched.calls.drop()  # of a batch of another size

    def committed(self) -> None:
        """A report was made: nothing goes back behind it."""
        if self._watch is not None and self._has_begun:
            self._watch.committed()

    def _tell(self) -> None:
        """Pass on what is newly known of the tiers; at first that no cheaper one is safe, so that policies wait."""
        if self._watch is None or not self.is_probing:
            return
        tiers = self._watch.known() if self._is_new else self._watch.news()
        self._is_new = False
        if tiers is not None and self._attempt.speaks:
            step = self._host.progress[0]
            self._attempt.outbox.add_tiers(TierReport(step=step, tiers=tiers, spent_s=self._watch.spent_s))

    def _plan(self, watched: Watched) -> WatchPlan:
        trial, device, directory = self._attempt.trial, self._attempt.ranks.device, self._attempt.directory
        size = sum(param.numel() for param in watched.model.parameters())
        fixed = [*(f"{name}={value}" for name, value in trial.params.items()), f"size={size}"]
        return WatchPlan(
            ladder=tuple(tier for tier in trial.limits.tiers if self._precision.has(tier)),
            budget=trial.probe_budget,
            target_samples=trial.samples_per_report * trial.max_reports,
            key=calibration_key(trial.job, fixed, self._host.settings.micro_batch, 1, device, "watched"),
            cache=directory.parents[2] / ".calibration" if len(directory.parents) > 2 else None,
        )
