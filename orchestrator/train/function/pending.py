"""Steps of a function: how long each took, and those whose losses are still on the device.

These are recorded in their order, a little later, so that nobody waits for a loss.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchestrator.policies.plan import Settings
from orchestrator.telemetry.record import FLAG_UNSETTLED
from orchestrator.train.attempt import Times
from orchestrator.train.step_result import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A step that was made: what is known of it, its times and flags, and the dials it was made with."""

    result: StepResult
    times: Times
    flags: int
    settings: Settings


UNSETTLED_STEPS = 3
"""Steps at the beginning whose times say nothing of the speed: caches and memory are filled; one behind a report."""


class StepClock:
    """Times one step after the other.

    Attributes:
        wait_s: seconds that the step waits for its share.
        switch_s: seconds in which dials were turned in front of it.
    """

    def __init__(self) -> None:
        self.wait_s = self.switch_s = 0.0
        self._began_s = self._began_cpu_s = 0.0
        self._num_unsettled = UNSETTLED_STEPS

    def begin(self) -> None:
        """The next step begins."""
        self._began_s, self._began_cpu_s = time.monotonic(), time.process_time()

    def begin_anew(self) -> None:
        """The next step begins behind something else than a step."""
        self._num_unsettled = max(self._num_unsettled, 1)
        self.wait_s = self.switch_s = 0.0
        self.begin()

    def end(self) -> tuple[Times, int]:
        """The step is over: its times, and its flags."""
        times = Times(
            began_s=self._began_s,
            step_s=time.monotonic() - self._began_s,
            cpu_s=time.process_time() - self._began_cpu_s,
            wait_s=self.wait_s,
            switch_s=self.switch_s,
        )
        flags = FLAG_UNSETTLED if self._num_unsettled else 0
        self._num_unsettled -= bool(self._num_unsettled)
        return times, flags


class Pending:
    """Steps that wait for their losses.

    Args:
        num_late: steps that are left waiting, so that the device works on while the older ones are read.
    """

    def __init__(self, num_late: int) -> None:
        self._num_late = num_late
        self._steps: deque[tuple[Made, _Loss | None]] = deque()

    def add(self, made: Made, loss: Tensor | None) -> None:
        """One more step; its loss is a scalar on the device, None where there was none."""
        self._steps.append((made, None if loss is None else _Loss(loss)))

    def take(self, *, all_of_them: bool = False) -> Iterator[Made]:
        """The steps that are over, with their losses."""
        while len(self._steps) > (0 if all_of_them else self._num_late):
            made, loss = self._steps.popleft()
            value = math.nan if loss is None else loss.read()
            result = replace(made.result, loss=value, is_loss_finite=loss is None or math.isfinite(value))
            yield replace(made, result=result)


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
