"""A trial's steps in graph mode: which are on their way, what came of them, and why a trial cannot have any.

The host runs ahead of the device by a few steps. A step whose gradient was not finite comes back late, together with
the news that all behind it did nothing; `Returned.is_skipped` says so and the stepper goes back to where it began.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from orchestrator.jobs.data import SampleCursor
from orchestrator.jobs.job import Forward, LossTerms
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train.batch.meter import PairPart
from orchestrator.train.batch.noise import NoiseEstimate, RecordedPair
from orchestrator.train.step_mode.captured import MAX_FLYING, Batch, CapturedStep, Clip
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.recorder import Recorder
from orchestrator.train.step_result import StepResult

CPU = torch.device("cpu")


class _Trial(Protocol):
    """What is needed of a stepper."""

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        ...

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...], tier: Tier) -> LossTerms:
        """The forward pass in a tier."""
        ...

    def compiled_loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...], tier: Tier) -> LossTerms:
        """The same, compiled."""
        ...


@dataclass(slots=True, kw_only=True)
class Launched:
    """A step on its way, and where the trial stood before it; `schedule` is that of its learning rates, if any."""

    step: int
    cursor: SampleCursor
    num_samples: int
    learning_rate: float
    data_s: float
    mode: StepMode
    schedule: dict[str, Any] | None = None
    num_elements: int = 0
    pair_part: PairPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """A step that came back. `interval_s` is the time since the one before it, None for the first in a row."""

    launched: Launched
    loss_sum: float
    grad_norm: float
    is_skipped: bool
    interval_s: float | None
    noise: NoiseEstimate | None = None


class Replay:
    """Launches recorded steps of one trial and brings their results back in order."""

    def __init__(self, captured: CapturedStep) -> None:
        self._captured = captured
        self._flying: deque[Launched] = deque()
        self._last_s: float | None = None

    @property
    def is_flying(self) -> bool:
        """Whether a step has not come back yet."""
        return bool(self._flying)

    @property
    def captured(self) -> CapturedStep:
        """The recordings."""
        return self._captured

    def launch(self, step: Launched, batches: Sequence[Batch], scale: float) -> None:
        """Start a step with the recording prepared last."""
        step.num_elements = self._captured.launch(batches, scale, step.pair_part)
        self._flying.append(step)

    def collect(self, num_left: int = MAX_FLYING) -> list[Returned]:
        """Results, oldest first, until only so many steps are on their way; nothing comes after a skipped one."""
        results = []
        while len(self._flying) > num_left:
            values = self._captured.read()
            now_s = time.monotonic()
            interval_s = None if self._last_s is None else now_s - self._last_s
            self._last_s = now_s
            launched = self._flying.popleft()
            is_pair = launched.pair_part is PairPart.COMPARE and not values.is_halted
            results.append(
                Returned(
                    launched=launched,
                    loss_sum=values.loss_sum,
                    grad_norm=values.grad_norm,
                    is_skipped=values.is_halted,
                    interval_s=interval_s,
                    noise=RecordedPair.estimate(values.products, launched.num_samples) if is_pair else None,
                )
            )
            if values.is_halted:
                self._captured.clear()
                self._flying.clear()
        if not self._flying:
            self._last_s = None
        return results


def result_of(each: Returned) -> StepResult:
    """What a step that came back did."""
    launched = each.launched
    return StepResult(
        step=launched.step,
        position=launched.cursor.position,
        mode=launched.mode,
        is_skipped=each.is_skipped,
        num_samples=0 if each.is_skipped else launched.num_samples,
        loss=each.loss_sum / max(1, launched.num_elements),
        grad_norm=each.grad_norm,
        learning_rate=launched.learning_rate,
        noise=each.noise,
        data_s=launched.data_s,
        is_loss_finite=math.isfinite(each.loss_sum),
    )


def refusal(world_size: int, optimizer: torch.optim.Optimizer, *, is_possible: bool) -> str | None:
    """Why steps of such a trial cannot be replayed, None if they may; `is_possible` says whether the device could."""
    if not is_possible:
        return "graphs need a CUDA device"
    if world_size > 1:
        return f"the collectives of {world_size} ranks are not captured"
    if all(group.get("fused") for group in optimizer.param_groups):
        return None
    return f"{type(optimizer).__name__} is not fused, so it cannot leave out a step on the device"


def refusal_of(dials: object) -> str | None:
    """Why steps with these dials (a tuple that holds the tier) are not replayed, None if they may."""
    # The loss scale changes with every overflow.
    is_scaled = isinstance(dials, tuple) and Tier.FP16 in dials
    return "a recording would have the loss scale of fp16 burnt in" if is_scaled else None


class Lowered:
    """A trial's job as a recorder sees it: its loss in the tier the trial has, compiled or not."""

    def __init__(self, trial: _Trial) -> None:
        self._trial = trial
        self.is_compiled = False

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> LossTerms:
        """The forward pass in the present tier; without a cache of cast weights, which a graph must not hold."""
        forward = self._trial.compiled_loss if self.is_compiled else self._trial.loss
        return forward(model, batch, self._trial.settings.tier)


def open_replay(
    job: Forward, model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, clip: Clip
) -> Replay:
    """Make ready to record: learning rates become tensors, so that a replay reads what is in force."""
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
    return Replay(CapturedStep(job, model, optimizer, device=device, clip=clip, recorder=recorder))
