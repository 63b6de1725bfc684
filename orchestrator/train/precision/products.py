"""Which function computes a linear layer in which tier, and where a layer has to fall back.

Every function takes (input, weight, bias) as `torch.nn.functional.linear` does. It answers in the input's dtype, or in
that of autocast where it is on, as every layer of torch does; weights stay fp32 masters and their gradients arrive in
fp32. Deliberately ignorant of models, ranks and of when a tier changes; asked by `PrecisionLinear.turn`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from orchestrator.policies.tier import FixedPoint, Tier, tier_facts
from orchestrator.train.precision import fp8, int8
from orchestrator.train.precision.fixed import fixed_linear
from orchestrator.train.precision.half import half_linear, tf32_linear

LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_ALIGNMENT = {Tier.FP8: fp8.ALIGNMENT, Tier.INT8: int8.ALIGNMENT}


def fp32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain product, in the dtype of its operands."""
    return F.linear(x, weight, bias)


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, keeps_weight: bool = False) -> Tensor:
    """All three products of the layer in bf16."""
    return half_linear(x, weight, bias, torch.bfloat16, keeps_weight=keeps_weight)


def fp16_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, keeps_weight: bool = False) -> Tensor:
    """All three products of the layer in fp16; gradients need the loss scaled."""
    return half_linear(x, weight, bias, torch.float16, keeps_weight=keeps_weight)


TIER_FUNCTIONS: dict[Tier, LinearFunction] = {
    Tier.FP32: fp32_linear,
    Tier.TF32: tf32_linear,
    Tier.BF16: bf16_linear,
    Tier.FP16: fp16_linear,
    Tier.FP8: fp8.fp8_linear,
    Tier.INT8: int8.int8_linear,
}
_KEEPING: dict[LinearFunction, LinearFunction] = {
    bf16_linear: partial(bf16_linear, keeps_weight=True),
    fp16_linear: partial(fp16_linear, keeps_weight=True),
}
"""The same with the cast weight kept for the backward pass."""


@cache
def function_of(tier: Tier, *, keeps_weight: bool = False) -> LinearFunction:
    """The function of a tier; always the same object, so that a compiled layer returns to what it compiled.

    Args:
        tier: the tier.
        keeps_weight: whether it may keep a cast weight from the forward to the backward pass, where the tier has one.
    """
    fixed = tier.fixed
    if fixed is not None:
        return _fixed_function(fixed)
    function = TIER_FUNCTIONS[tier]
    return _KEEPING.get(function, function) if keeps_weight else function


def _fixed_function(fixed: FixedPoint) -> LinearFunction:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fixed_linear(x, weight, bias, fixed)

    return linear


def tier_of_layer(tier: Tier, in_features: int, out_features: int) -> Tier:
    """The tier in which a layer of that size really computes: its own, or the fallback where the shape forbids it."""
    alignment = _ALIGNMENT.get(tier)
    if alignment is None or (in_features % alignment == 0 and out_features % alignment == 0):
        return tier
    fallback = tier_facts(tier).fallback
    assert fallback is not None
    return fallback
