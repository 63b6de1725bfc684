"""Batch and precision of declared trainings, whose steps the orchestrator makes itself."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits
from orchestrator.train.batch.guard import MemoryGuard
from orchestrator.train.dials.dial import held_still
from orchestrator.train.precision.watch import PrecisionWatch
from orchestrator.train.stepper import Stepper


class BatchDial:
    """Micro-batch and accumulation of the stepper, as far as there is memory for them."""

    name = "batch"

    def __init__(self, stepper: Stepper, guard: MemoryGuard, start: Settings) -> None:
        self._stepper, self._guard, self._start = stepper, guard, start

    @property
    def why_off(self) -> str:
        """A step of the training's own takes one batch as it is."""
        return self._stepper.whole if self._stepper.job.has_own_step else ""

    def limits(self, asked: DialLimits) -> DialLimits:
        """All that the run file allows; where a micro-batch may not be cut, whole micro-batches of the start's size."""
        if self.why_off:
            return held_still(self.name, asked, self._start)
        if not self._stepper.whole:
            return asked
        micro_batch = self._start.micro_batch
        unit = micro_batch * self._start.num_workers
        return replace(
            asked,
            min_micro_batch=micro_batch,
            max_micro_batch=micro_batch,
            min_global_batch=min(self._start.global_batch, -(-asked.min_global_batch // unit) * unit),
        )

    def prepare(self, asked: Settings) -> Settings:
        """The largest micro-batch up to the asked one that every rank has room for, with the same global batch."""
        return self._guard.prepare(asked)

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Cut the samples of later steps so; the learning rate follows the global batch."""
        self._stepper.turn(replace(settings, tier=self._stepper.settings.tier))


class PrecisionDial:
    """The precision tier of the linear layers; its guard begins to watch the new one."""

    name = "precision"

    def __init__(self, stepper: Stepper, watch: PrecisionWatch, start: Settings) -> None:
        self._stepper, self._watch, self._start = stepper, watch, start

    @property
    def why_off(self) -> str:
        """Tiers are compared by their gradients, which a step of the training's own keeps to itself."""
        return "train_step computes its gradients itself" if self._stepper.job.has_own_step else ""

    def limits(self, asked: DialLimits) -> DialLimits:
        """All that the run file allows."""
        return held_still(self.name, asked, self._start) if self.why_off else asked

    def prepare(self, asked: Settings) -> Settings:
        """As asked; room in memory is the batch dial's question."""
        return asked

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Compute later steps in that tier."""
        self._stepper.turn(settings)
        self._watch.turned()
