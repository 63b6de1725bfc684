"""The precision dial of a user's function: torch's autocast, switched between two steps.

Master weights, gradients and optimizer state stay fp32. Autocast keeps no copies of weights here: its cache would
outlive the step that changes them, because it is emptied only where a `with torch.autocast` block ends.

After a turn from bf16 back to fp32 autocast stays on and casts up: what the training carries over from before (a hidden
state, samples of a generator whose optimizer steps later) is bf16 and would meet fp32 weights.

Of a model that the function watches, linear layers can compute in fp8, int8 or fixed point as well: their class is
changed in place while such a tier is in force, and changed back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits
from orchestrator.policies.tier import Tier, tier_facts
from orchestrator.train.dials.dial import held_still
from orchestrator.train.precision.tiers import install, set_tier, uninstall

OWN = "it uses autocast by itself"
SCALER = "it scales its loss by itself (GradScaler)"
LINE_SEARCH = "LBFGS compares losses within a step, which bf16 rounds alike"
_CASTS = {Tier.BF16: torch.bfloat16}
"""Tiers that autocast computes. fp16 would need a scaled loss, others need layers of their own."""


class Autocast:
    """fp32, tf32 (on a GPU) and bf16 of a function on `device`; of a watched model what its linear layers have too."""

    name = "precision"

    def __init__(self, device: torch.device, start: Settings, *, why_off: str = "") -> None:
        self._device, self._start = device, start
        self._has_cast = False
        self._own_matmul: str | None = None
        self._own_dtype = torch.get_autocast_dtype(device.type)
        self._had_cache = torch.is_autocast_cache_enabled()
        self._model: nn.Module | None = None
        self.why_off = why_off

    def watch(self, model: nn.Module) -> None:
        """Linear layers of `model` may compute in tiers that autocast does not have.

        A model whose layers are compiled keeps them: another class would compile it anew at each turn.
        """
        has_layers = any(type(module) is nn.Linear for module in model.modules())
        self._model = model if has_layers and not is_compiled(model) else None

    def limits(self, asked: DialLimits) -> DialLimits:
        """Those of the run file's tiers that autocast has, or the watched model's linear layers."""
        if self.why_off:
            return held_still(self.name, asked, self._start)
        return replace(asked, tiers=tuple(tier for tier in asked.tiers if self.has(tier)))

    def has(self, tier: Tier) -> bool:
        """Whether the function can compute in that tier, fast or not."""
        known = {Tier.FP32, *_CASTS, self._start.tier, *((Tier.TF32,) if self._device.type == "cuda" else ())}
        return tier in known or (self._model is not None and _is_of_layers(tier))

    def prepare(self, asked: Settings) -> Settings:
        """As asked, unless the training turned out to choose its precision by itself."""
        return replace(asked, tier=self._start.tier) if self.why_off else asked

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Compute in that tier from now on, evaluations included."""
        self.set(settings.tier)

    def set(self, tier: Tier) -> None:
        """Switch autocast, tf32 and the watched model's layers as the tier needs."""
        if self.why_off:
            return
        cast = _cast_of(tier)
        if cast is not None or self._has_cast:
            self._has_cast = True
            torch.set_autocast_dtype(self._device.type, cast or torch.float32)
            torch.set_autocast_cache_enabled(False)
            torch.set_autocast_enabled(self._device.type, True)
        self._set_matmul(is_tf32=self._device.type == "cuda" and (tier is Tier.TF32 or _is_of_layers(tier)))
        self._set_layers(tier)

    @contextmanager
    def as_if(self, tier: Tier, now: Tier) -> Iterator[None]:
        """Compute in `tier` within, between two steps of `now`; everything is as before afterwards."""
        kind = self._device.type
        before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
        has_cast = self._has_cast
        try:
            self.set(tier)
            yield
        finally:
            self.set(now)
            self._has_cast = has_cast
            torch.set_autocast_enabled(kind, before[0])
            torch.set_autocast_dtype(kind, before[1])
            torch.set_autocast_cache_enabled(before[2])

    def leave_alone(self, why: str) -> None:
        """The training chooses its precision by itself: back to what it began with, for good."""
        self.set(self._start.tier)
        self.restore()
        self.why_off = why

    def restore(self) -> None:
        """Autocast, tf32 and layers as they were before."""
        self._set_matmul(is_tf32=False)
        if self._model is not None:
            uninstall(self._model)
        if self._has_cast:
            torch.set_autocast_enabled(self._device.type, False)
            torch.set_autocast_dtype(self._device.type, self._own_dtype)
            torch.set_autocast_cache_enabled(self._had_cache)

    def _set_matmul(self, *, is_tf32: bool) -> None:
        """Whether fp32 products may use tf32; otherwise what the training has of its own."""
        if is_tf32 and self._own_matmul is None:
            self._own_matmul = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
        elif not is_tf32 and self._own_matmul is not None:
            torch.set_float32_matmul_precision(self._own_matmul)
            self._own_matmul = None

    def _set_layers(self, tier: Tier) -> None:
        if self._model is None:
            return
        if _is_of_layers(tier):
            install(self._model)
            set_tier(self._model, tier, turns_tensor_cores=False)
        else:
            uninstall(self._model)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model was compiled.

    By attributes of torch that are private, for want of a public question; without them nothing counts as compiled.
    Source: torch 2.11 to 2.15, `torch.compile(module)` and `module.compile()`.
    """
    names = ("_orig_mod", "_compiled_call_impl")
    return any(getattr(module, name, None) is not None for module in model.modules() for name in names)


def _is_of_layers(tier: Tier) -> bool:
    """Whether linear layers compute the tier, and autocast does not."""
    return tier in {Tier.FP8, Tier.INT8} or tier.fixed is not None


def _cast_of(tier: Tier) -> torch.dtype | None:
    """What autocast lowers to in that tier: all products, or what is no linear layer."""
    if _is_of_layers(tier):
        companion = tier_facts(tier).companion_dtype
        return None if companion is None else getattr(torch, companion)
    return _CASTS.get(tier)
