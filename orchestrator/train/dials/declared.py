"""Batch and precision of declared trainings, whose steps the orchestrator makes itself."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits
from orchestrator.train.batch.guard import MemoryGuard
from orchestrator.train.precision.watch import PrecisionWatch
from orchestrator.train.stepper import Stepper


class BatchDial:
    """Micro-batch and accumulation of the stepper, as far as there is memory for them."""

    name = "batch"
    why_off = ""

    def __init__(self, stepper: Stepper, guard: MemoryGuard) -> None:
        self._stepper, self._guard = stepper, guard

    def limits(self, asked: DialLimits) -> DialLimits:
        """All that the run file allows."""
        return asked

    def prepare(self, asked: Settings) -> Settings:
        """The largest micro-batch up to the asked one that every rank has room for, with the same global batch."""
        return self._guard.prepare(asked)

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Cut the samples of later steps so; the learning rate follows the global batch."""
        self._stepper.turn(replace(settings, tier=self._stepper.settings.tier))


class PrecisionDial:
    """The precision tier of the linear layers; its guard begins to watch the new one."""

    name = "precision"
    why_off = ""

    def __init__(self, stepper: Stepper, watch: PrecisionWatch) -> None:
        self._stepper, self._watch = stepper, watch

    def limits(self, asked: DialLimits) -> DialLimits:
        """All that the run file allows."""
        return asked

    def prepare(self, asked: Settings) -> Settings:
        """As asked; room in memory is the batch dial's question."""
        return asked

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Compute later steps in that tier."""
        self._stepper.turn(settings)
        self._watch.turned()
