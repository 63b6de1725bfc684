"""Rounding to other number formats: fixed point with a straight-through gradient, tf32, and stochastic rounding.

`fixed_point` is for everybody: it is differentiable, so a model that uses it trains. The rest serves the products of
linear layers (`half`, `fp8`, `int8`, `fixed`). Knows tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orchestrator.policies.tier import FixedPoint, Rounding

_TF32_DROPPED_BITS = 13
_SMALLEST_SCALE = 1e-30


def fixed_point(x: Tensor, fixed: FixedPoint) -> Tensor:
    """`x` on the grid of a fixed-point format, f(x) = floor(x * 2**k) / 2**k or rounded otherwise, saturated.

    The gradient goes straight through where the value is inside the word and is zero where it saturates.

    In fp32, k = 32 (the classic of textbooks) is the identity for every |x| >= 2**-9: the grid is finer than fp32 is
    there. With floor it turns every smaller negative number towards -2**-32.
    """
    rounded: Tensor = _FixedPoint.apply(x, fixed.k, fixed.bits, fixed.mode.value)  # type: ignore[no-untyped-call]
    return rounded


def to_grid(x: Tensor, k: int, bits: int | None, mode: str) -> Tensor:
    """The nearest number of the grid without gradient; NaN stays NaN."""
    scaled = torch.ldexp(x, torch.tensor(k, device=x.device))
    if mode == Rounding.NEAREST:
        units = scaled.round()
    elif mode == Rounding.FLOOR:
        units = scaled.floor()
    else:
        units = round_stochastically(scaled)
    if bits is not None:
        units = units.clamp(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return torch.ldexp(units, torch.tensor(-k, device=x.device))


def round_stochastically(x: Tensor) -> Tensor:
    """A neighbouring whole number, so that the mean of many roundings is `x`."""
    return (x + torch.rand_like(x)).floor()


def saturates(x: Tensor, k: int, bits: int | None) -> Tensor | None:
    """Where `x` lies outside the word; None for a word without end."""
    if bits is None:
        return None
    return (x < -(2.0 ** (bits - 1 - k))) | (x >= 2.0 ** (bits - 1 - k))


def to_tf32(x: Tensor) -> Tensor:
    """fp32 `x` with the 10 binary digits of tf32, halves away from zero; what a tensor core reads. NaN stays NaN."""
    half = 1 << (_TF32_DROPPED_BITS - 1)
    bits = (x.view(torch.int32) + half) & ~((1 << _TF32_DROPPED_BITS) - 1)
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def block_scale(x: Tensor, digits: int) -> Tensor:
    """The power of two by which the largest |x| fills a word of `digits` binary digits; a scalar tensor."""
    return torch.exp2(digits - torch.ceil(torch.log2(largest(x).clamp(min=_SMALLEST_SCALE))))


def largest(x: Tensor) -> Tensor:
    """The largest |x| as an fp32 scalar tensor; 0 of nothing, NaN where there is one."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


class _FixedPoint(torch.autograd.Function):
    """Rounding whose gradient is that of the identity inside the word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, bits: int | None, mode: str) -> Tensor:  # noqa: ANN401
        """Keeps one bit per value (as a bool) where the word has an end, nothing where it has none."""
        outside = saturates(x, k, bits)
        ctx.has_end = outside is not None
        if outside is not None:
            ctx.save_for_backward(outside)
        return to_grid(x, k, bits, mode)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Straight through."""
        if ctx.has_end:
            grad = grad.masked_fill(ctx.saved_tensors[0], 0.0)
        return grad, None, None, None
