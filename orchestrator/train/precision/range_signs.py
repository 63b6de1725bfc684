"""How much of what a tier multiplies falls out of its range: saturates at the top, or vanishes to zero at the bottom.

Counted in one step of many by hooks that look at the operands of every linear layer, so that other steps pay nothing;
no operand is changed. What a range loses is a sign and no proof: the guard asks for a probe where it is much, and
leaves the tier where nearly all of an operand is lost. Knows layers and formats; called by `watch`, judged by `guard`.

Not seen: steps that are replayed from a graph or compiled, which hold no hooks; and in fp16 what became zero before a
layer got it, so the smallest numbers of fp16 count as vanished.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from orchestrator.policies.tier import Rounding, Tier
from orchestrator.train.precision import fp8, int8
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.precision.rounding import saturates

_FP16_LARGEST, _FP16_SMALLEST = 65504.0, 2.0**-24
_FP8_SMALLEST = {fp8.FORWARD: 2.0**-9, fp8.GRADIENT: 2.0**-16}


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeSigns:
    """Of the operand that fares worst, the parts that saturate and that vanish; of numbers that are not zero."""

    saturated: float
    vanished: float


def has_range(tier: Tier) -> bool:
    """Whether numbers can fall out of the range of the tier: 8 bits of exponent lose nothing that matters."""
    return tier in {Tier.FP16, Tier.FP8, Tier.INT8} or tier.fixed is not None


class RangeMeter:
    """Counts in one step; every rank has its own."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._shares: list[Tensor] = []

    @property
    def is_on(self) -> bool:
        """Whether the present step is counted."""
        return bool(self._handles)

    def begin(self, model: nn.Module) -> None:
        """Count what the layers of `model` get until `end`."""
        if self.is_on:  # the step before did not come to its end and is done again
            return
        for layer in model.modules():
            if isinstance(layer, PrecisionLinear) and has_range(layer.real_tier):
                self._handles.append(layer.register_forward_hook(self._see))

    def end(self) -> RangeSigns | None:
        """Stop counting; what was found, None where no layer was seen."""
        for handle in self._handles:
            handle.remove()
        shares, self._handles, self._shares = self._shares, [], []
        if not shares:
            return None
        saturated, vanished = torch.stack(shares).amax(dim=0).tolist()
        return RangeSigns(saturated=saturated, vanished=vanished)

    def _see(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, PrecisionLinear)
        tier = layer.real_tier
        weight = layer.weight.detach()
        if isinstance(weight, DTensor):  # a layer that is a sharded unit of its own has put its parts away again
            weight = weight.to_local()
        self._shares += [_lost(args[0].detach(), tier), _lost(weight, tier)]
        if output.requires_grad:
            # A hook of the tensor, not of the module: a first layer's input has no gradient, and torch warns of that.
            see = partial(self._see_gradient, tier)
            output.register_hook(see)  # type: ignore[no-untyped-call]

    def _see_gradient(self, tier: Tier, grad: Tensor) -> None:
        self._shares.append(_lost(grad.detach(), tier, is_gradient=True))


def _lost(x: Tensor, tier: Tier, *, is_gradient: bool = False) -> Tensor:
    """(saturated, vanished) as parts of the numbers of `x` that are not zero; NaN counts as saturated."""
    x = x.float()
    top, bottom = _ends(x, tier, is_gradient=is_gradient)
    magnitude = x.abs()
    is_saturated = magnitude.isnan() if top is None else top | magnitude.isnan()
    vanished = (magnitude > 0) & (magnitude <= bottom)
    num = (magnitude != 0).sum().clamp(min=1)
    return torch.stack((is_saturated.sum() / num, vanished.sum() / num))


def _ends(x: Tensor, tier: Tier, *, is_gradient: bool) -> tuple[Tensor | None, Tensor]:
    """Where `x` saturates (None: nowhere), and the magnitude up to which it becomes zero."""
    if tier is Tier.FP16:
        return x.abs() > _FP16_LARGEST, x.new_tensor(_FP16_SMALLEST)
    if tier is Tier.FP8:  # scaled so that the largest number just fits
        dtype = fp8.GRADIENT if is_gradient else fp8.FORWARD
        return None, fp8.scale_of(x, dtype) * (_FP8_SMALLEST[dtype] / 2)
    if is_gradient:  # int8 and fixed point round gradients stochastically, after they were scaled
        return None, x.new_zeros(())
    if tier is Tier.INT8:
        return None, x.abs().amax(dim=-1, keepdim=True) / (2 * int8.LARGEST)
    fixed = tier.fixed
    assert fixed is not None, "no other tier has a range"
    bottom = 0.0 if fixed.mode is Rounding.STOCHASTIC else 2.0 ** -(fixed.k + (fixed.mode is Rounding.NEAREST))
    return saturates(x, fixed.k, fixed.bits), x.new_tensor(bottom)
