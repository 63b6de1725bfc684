"""Steps whose losses are still on the device: recorded in their order, a little later, so that nobody waits."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchestrator.policies.plan import Settings
from orchestrator.train.attempt import Times
from orchestrator.train.step_result import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A step that was made: what is known of it, its times and flags, and the dials it was made with."""

    result: StepResult
    times: Times
    flags: int
    settings: Settings


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
