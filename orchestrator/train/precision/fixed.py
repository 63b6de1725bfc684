"""Linear layers in fixed point: operands on the grid of the format, products in fp32. An emulation everywhere.

Input and weight are rounded as the format says. A gradient has no place in a fixed range, so it is first scaled by a
power of two that makes its largest number fill the word, and then rounded stochastically: on a coarse grid most of it
would otherwise vanish. Called through `products`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orchestrator.policies.tier import FixedPoint
from orchestrator.train.precision.half import exact_linear, result_dtype, rows, sum_rows
from orchestrator.train.precision.rounding import block_scale, round_stochastically, saturates, to_grid


def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, fixed: FixedPoint) -> Tensor:
    """All three products of the layer on fixed-point operands."""
    format_ = (fixed.k, fixed.bits, fixed.mode.value)
    product: Tensor = _FixedProducts.apply(x, weight, bias, format_, result_dtype(x))  # type: ignore[no-untyped-call]
    return product


def _round_gradient(grad: Tensor, k: int, bits: int | None) -> Tensor:
    """The gradient on a grid of as many numbers as the word has; of 2**(k + 1) where the word has no end."""
    scale = block_scale(grad, (k + 1 if bits is None else bits) - 1)
    if bits is None and k >= 23:  # finer than fp32
        return grad
    return round_stochastically(grad * scale) / scale


@torch._dynamo.allow_in_graph
class _FixedProducts(torch.autograd.Function):
    """The three products of a layer; see the module."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight_nk: Tensor,
        bias_n: Tensor | None,
        format_: tuple[int, int | None, str],
        out_dtype: torch.dtype,
    ) -> Tensor:
        """The product in `out_dtype`; keeps the rounded operands and where they saturated."""
        k, bits, mode = format_
        x_grid, w_grid = to_grid(x.float(), k, bits, mode), to_grid(weight_nk.float(), k, bits, mode)
        outside = (None, None) if bits is None else (saturates(x, k, bits), saturates(weight_nk, k, bits))
        ctx.save_for_backward(x_grid, w_grid, *outside)
        ctx.format_ = format_
        ctx.dtypes = (x.dtype, weight_nk.dtype, None if bias_n is None else bias_n.dtype)
        y = exact_linear(x_grid, w_grid)
        return (y if bias_n is None else y + bias_n).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Straight through the rounding; nothing goes through what saturated."""
        x_grid, w_grid, x_outside, w_outside = ctx.saved_tensors
        k, bits, _ = ctx.format_
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_grid = _round_gradient(grad.float(), k, bits)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = exact_linear(grad_grid, w_grid.t())
            grad_x = (grad_x if x_outside is None else grad_x.masked_fill(x_outside, 0.0)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = exact_linear(rows(grad_grid).t(), rows(x_grid).t())
            grad_weight = grad_weight if w_outside is None else grad_weight.masked_fill(w_outside, 0.0)
            grad_weight = grad_weight.to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_rows(grad).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None
