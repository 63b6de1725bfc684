"""The loss scale of fp16: small gradients are multiplied into its range, and the scale gives way when they leave it.

Own code rather than `torch.amp.GradScaler`: whether a step is skipped is already known from the norm of the whole
gradient, which is the same on every rank (also of sharded gradients), so ranks cannot disagree and nothing more is
exchanged or read back. The rule is GradScaler's: halve on overflow, double after 2000 good steps. Turned off, it keeps
its scale for the next time. Called by the stepper.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.policies.tier import Tier

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000
MAX_SCALE = 2.0**24


@dataclass(slots=True)
class LossScale:
    """The scale of one trial.

    Attributes:
        scale: a power of two.
        good_steps: steps since it last changed.
    """

    scale: float = INITIAL_SCALE
    good_steps: int = 0

    def factor(self, tier: Tier) -> float:
        """By what the loss is multiplied in `tier`."""
        return self.scale if tier is Tier.FP16 else 1.0

    def unscale(self, tier: Tier, gradients: Iterable[Tensor]) -> None:
        """Divide gradients of a scaled loss by the scale, in place; exact, as it is a power of two."""
        if tier is Tier.FP16:
            held = [gradient for gradient in gradients if gradient.numel()]
            torch._foreach_mul_(held, 1.0 / self.scale)

    def update(self, tier: Tier, *, is_skipped: bool) -> None:
        """After a step in `tier`: back off when it was skipped, grow when all went well for long."""
        if tier is not Tier.FP16:
            return
        if is_skipped:
            self.scale, self.good_steps = self.scale / 2, 0
            return
        self.good_steps += 1
        if self.good_steps >= GROWTH_STEPS:
            self.scale, self.good_steps = min(MAX_SCALE, self.scale * 2), 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    @classmethod
    def restored(cls, state: dict[str, float] | None) -> LossScale:
        """The scale of a checkpoint; a new one for a checkpoint from before there was one."""
        if state is None:
            return cls()
        return cls(scale=float(state["scale"]), good_steps=int(state["good_steps"]))
