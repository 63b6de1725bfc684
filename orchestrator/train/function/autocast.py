"""The precision dial of a user's function: torch's autocast, switched between two steps.

Master weights, gradients and optimizer state stay fp32. Autocast keeps no copies of weights here: its cache would
outlive the step that changes them, because it is emptied only where a `with torch.autocast` block ends.

After a turn from bf16 back to fp32 autocast stays on and casts up: what the training carries over from before (a hidden
state, samples of a generator whose optimizer steps later) is bf16 and would meet fp32 weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits
from orchestrator.policies.tier import Tier
from orchestrator.train.dials.dial import held_still

OWN = "it uses autocast by itself"
SCALER = "it scales its loss by itself (GradScaler)"
LINE_SEARCH = "LBFGS compares losses within a step, which bf16 rounds alike"
_CASTS = {Tier.BF16: torch.bfloat16}
"""Tiers that autocast computes. fp16 would need a scaled loss, others need layers of their own."""


class Autocast:
    """fp32, tf32 (on a GPU) and bf16 of a function on `device`."""

    name = "precision"

    def __init__(self, device: torch.device, start: Settings, *, why_off: str = "") -> None:
        self._device, self._start = device, start
        self._is_tf32 = self._has_cast = False
        self._own_dtype = torch.get_autocast_dtype(device.type)
        self._had_cache = torch.is_autocast_cache_enabled()
        self.why_off = why_off

    def limits(self, asked: DialLimits) -> DialLimits:
        """Those of the run file's tiers that autocast has."""
        if self.why_off:
            return held_still(self.name, asked, self._start)
        known = {Tier.FP32, *_CASTS, *((Tier.TF32,) if self._device.type == "cuda" else ())}
        tiers = tuple(tier for tier in asked.tiers if tier in known or tier is self._start.tier)
        return replace(asked, tiers=tiers)

    def prepare(self, asked: Settings) -> Settings:
        """As asked, unless the training turned out to choose its precision by itself."""
        return replace(asked, tier=self._start.tier) if self.why_off else asked

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Compute in that tier from now on, evaluations included."""
        self.set(settings.tier)

    def set(self, tier: Tier) -> None:
        """Switch autocast and tf32 as the tier needs."""
        if self.why_off:
            return
        cast = _CASTS.get(tier)
        if cast is not None or self._has_cast:
            self._has_cast = True
            torch.set_autocast_dtype(self._device.type, cast or torch.float32)
            torch.set_autocast_cache_enabled(False)
            torch.set_autocast_enabled(self._device.type, True)
        if tier is Tier.TF32 or (tier is Tier.FP32 and self._is_tf32):
            self._is_tf32 = tier is Tier.TF32
            torch.set_float32_matmul_precision("high" if self._is_tf32 else "highest")

    def leave_alone(self, why: str) -> None:
        """The training chooses its precision by itself: back to what it began with, for good."""
        self.set(self._start.tier)
        self.restore()
        self.why_off = why

    def restore(self) -> None:
        """Autocast as it was before."""
        if self._has_cast:
            torch.set_autocast_enabled(self._device.type, False)
            torch.set_autocast_dtype(self._device.type, self._own_dtype)
            torch.set_autocast_cache_enabled(self._had_cache)
