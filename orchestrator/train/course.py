"""What a trial asks for while it trains, so that whoever runs it may run others in between.

The loop of a declared training is a generator of these: it asks to wait, or for steps, and goes on with the answer. A
process with one trial answers by waiting and stepping; one with several waits for none of them and steps them together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.control.orders import Outcome
from orchestrator.train.batch.guard import Move
from orchestrator.train.step_result import StepResult


@dataclass(frozen=True, slots=True)
class Wait:
    """Go on once that is met; the answer is False where the trial was told to leave first."""

    is_met: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """One more step, or so many at most; the answer is a `Stepped`."""

    at_most: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """What came of steps.

    Attributes:
        results: oldest first; also of steps that were begun before.
        move: what the trial had to do to have room for the step.
        num_together: trials that were stepped as one; 0 where the trial stepped alone.
    """

    results: list[StepResult] = field(default_factory=list)
    move: Move | None = None
    num_together: int = 0


Course = Generator[Wait | Step, Any, Outcome]
"""A trial from its grant to its end; sent the answer to what it asked for."""
