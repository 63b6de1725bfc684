"""What one optimizer step did: made by the stepper, read by the loop and its guards."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.train.batch.noise import NoiseEstimate
from orchestrator.train.step_mode.choice import StepMode


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did. `is_skipped` means that a gradient was not finite and nothing was changed.

    `step` is the number of optimizer steps before it, `position` the samples consumed before it. `is_loss_finite` is of
    this rank's samples; a gradient may overflow in fp16 although the loss does not. `num_steps` is above 1 where many
    short steps are told of together: then `num_samples` is that of all, `loss` their mean, and the rest is of the last.
    """

    step: int
    position: int
    mode: StepMode
    is_skipped: bool
    num_samples: int
    loss: float
    grad_norm: float
    learning_rate: float
    noise: NoiseEstimate | None
    data_s: float
    is_loss_finite: bool = True
    num_steps: int = 1
