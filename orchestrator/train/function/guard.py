"""The guard of a function's precision: protects it from a cheaper tier that harms it.

Without a watched model only what is not finite counts, as in declared trainings without probes: the trial goes on in
the dearest tier, and where its losses stay not finite there it begins again in its start tier, since its weights are
gone. With one, `precision.watch` calibrates and probes tiers on kept calls, and puts weights back that a tier spoilt.
Called by the driver at each boundary, and with each step once its loss is known.
"""

from __future__ import annotations

import logging
import math

import torch

from orchestrator.control.orders import TierReport
from orchestrator.policies.tier import Tier, is_cheaper
from orchestrator.train.function.watched import Watched
from orchestrator.train.precision.guard import Cause, Move
from orchestrator.train.precision.watch import PrecisionWatch, StepNews, WatchPlan
from orchestrator.train.step_result import StepResult

logger = logging.getLogger(__name__)

MAX_SPOILT = 3
"""Losses in a row that are not finite in the dearest tier, after a cheaper one, until the attempt is given up."""


class TierGuard:
    """The guard of one attempt. One rank judges by probes; several only by what is not finite.

    Args:
        dearest: the tier to flee to.
    """

    def __init__(self, dearest: Tier) -> None:
        self._dearest = dearest
        self._watch: PrecisionWatch | None = None
        self._watched: Watched | None = None
        self._has_begun = self._is_new = False
        self._has_fled = False
        self._num_spoilt = 0
        self._move: Move | None = None

    def watch(self, watched: Watched, plan: WatchPlan, device: torch.device) -> None:
        """Probe with that model from here on."""
        self._watched, self._watch = watched, PrecisionWatch(plan, watched, device, None)
        self._is_new = True

    @property
    def is_probing(self) -> bool:
        """Whether probes decide which tiers are safe."""
        return self._watch is not None and self._watch.is_probing

    @property
    def is_hopeless(self) -> bool:
        """Whether weights that a cheaper tier spoilt make every loss not finite."""
        return self._num_spoilt >= MAX_SPOILT

    def before_step(self) -> Move | None:
        """Between two steps: what a step asked for, or a probe found.

        Raises:
            Exception: whatever the model raises when it is computed again.
        """
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

    def after_step(self, tier: Tier, result: StepResult, busy_s: float) -> None:
        """Judge a step; the move that follows is made at the next boundary."""
        is_bad = not result.is_loss_finite
        self._num_spoilt = self._num_spoilt + 1 if is_bad and self._has_fled and tier is self._dearest else 0
        move = None
        if self._watch is not None:
            news = StepNews(
                is_skipped=is_bad,
                is_loss_finite=not is_bad,
                loss=result.loss,
                loss_scale=1.0,
                busy_s=busy_s,
            )
            move = self._watch.after_step(news)
        if is_bad and is_cheaper(tier, self._dearest):
            reason = f"the loss of step {result.step} is {result.loss} in {tier}"
            move = Move(tier=self._dearest, cause=Cause.NON_FINITE, reason=reason, is_rollback=True)
        self._move = move or self._move

    def take_report(self, tier: Tier, name: str, value: float) -> None:
        """Judge the metric of a report as well: a training may look at its losses by itself."""
        if not math.isfinite(value) and is_cheaper(tier, self._dearest):
            reason = f"{name} was reported as {value} in {tier}"
            self._move = Move(tier=self._dearest, cause=Cause.NON_FINITE, reason=reason, is_rollback=True)

    def obeyed(self, move: Move) -> None:
        """The tier was turned as a move says: put back what the tier before has spoilt, if a copy is there."""
        self._has_fled = True
        if move.is_rollback and self._watch is not None and self._has_begun:
            self._watch.go_back()

    def turned(self) -> None:
        """The dials changed."""
        if self._watch is not None:
            self._watch.turned()
        if self._watched is not None:
            self._watched.calls.drop()  # of a batch of another size

    def committed(self) -> None:
        """A report was made: nothing goes back behind it."""
        if self._watch is not None and self._has_begun:
            self._watch.committed()

    def news(self, step: int) -> TierReport | None:
        """What is newly known of the tiers."""
        if self._watch is None or not self.is_probing:
            return None
        tiers = self._watch.known() if self._is_new else self._watch.news()
        self._is_new = False  # before anything was probed no cheaper tier is safe, and policies wait for probes
        return None if tiers is None else TierReport(step=step, tiers=tiers, spent_s=self._watch.spent_s)
