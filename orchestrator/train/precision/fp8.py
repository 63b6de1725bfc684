"""Linear layers in fp8: e4m3 forward, e5m2 gradients, one dynamic scale per tensor, over `torch._scaled_mm`.

What is kept for the backward pass is the quantised input, one byte a number, and the fp32 weight itself, which exists
anyway and is quantised again with the scale it had. On a device without an fp8 unit the same numbers are multiplied in
fp32. Scales follow Micikevicius et al. 2022 (arXiv 2209.05433); dynamic scaling needs no history, so that a tier can
be entered at any step. Called through `products`.

Shapes: M rows (tokens), K inputs, N outputs. The hardware wants K and N in multiples of 16 (`ALIGNMENT`) and, because M
is summed over in the weight gradient, M as well: rows are filled up with zeros, columns are not (the layer falls back).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from orchestrator.train.precision.half import exact_linear, filled_rows, result_dtype, sum_rows, unfilled
from orchestrator.train.precision.rounding import largest

ALIGNMENT = 16
FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST = {FORWARD: 448.0, GRADIENT: 57344.0}
_SMALLEST_AMAX = 1e-12


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All three products of the layer on fp8 operands."""
    product: Tensor = _Fp8Products.apply(x, weight, bias, result_dtype(x))  # type: ignore[no-untyped-call]
    return product


@cache
def has_unit(device: torch.device) -> bool:
    """Whether the device multiplies fp8 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What one unit of the quantised tensor is worth; NaN or infinity where the tensor has one."""
    return largest(x).clamp(min=_SMALLEST_AMAX) / _LARGEST[dtype]


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x / scale` in fp8, saturated: the cast alone would make infinities of what rounds beyond the largest number."""
    limit = _LARGEST[dtype]
    return (x.float() * scale.reciprocal()).clamp(-limit, limit).to(dtype)


def multiply(a_mk: Tensor, b_nk: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, *, is_fast: bool) -> Tensor:
    """The product a @ b.T of two fp8 tensors, both laid out along the summed dimension, in `dtype`.

    `scales` are what one unit of each is worth. `is_fast` lets sums be kept in fewer bits: good enough forward, not for
    gradients (torchao does so too).
    """
    if not has_unit(a_mk.device):
        return (exact_linear(a_mk.float(), b_nk.float()) * (scales[0] * scales[1])).to(dtype)
    product: Tensor = torch._scaled_mm(
        a_mk, b_nk.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=is_fast
    )
    return product


@torch._dynamo.allow_in_graph
class _Fp8Products(torch.autograd.Function):
    """The three products of a layer; see the module."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight_nk: Tensor,
        bias_n: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """The product in `out_dtype`."""
        x_mk = filled_rows(x, ALIGNMENT)
        scale_x, scale_w = scale_of(x_mk, FORWARD), scale_of(weight_nk, FORWARD)
        x_fp8, w_fp8 = quantise(x_mk, scale_x, FORWARD), quantise(weight_nk, scale_w, FORWARD)
        y_mn = multiply(x_fp8, w_fp8, (scale_x, scale_w), out_dtype, is_fast=True)
        ctx.save_for_backward(x_fp8, scale_x, weight_nk, scale_w)
        ctx.dtypes = (x.dtype, weight_nk.dtype, None if bias_n is None else bias_n.dtype)
        y = unfilled(y_mn, x)
        return y if bias_n is None else (y + bias_n.to(out_dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The other two products. Both need their operands laid out along another dimension than they came in."""
        x_fp8, scale_x, weight_nk, scale_w = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_mn = filled_rows(grad, ALIGNMENT)
        scale_g = scale_of(grad_mn, GRADIENT)
        grad_fp8 = quantise(grad_mn, scale_g, GRADIENT)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            w_kn = quantise(weight_nk, scale_w, FORWARD).t().contiguous()
            grad_x = unfilled(multiply(grad_fp8, w_kn, (scale_g, scale_w), x_dtype, is_fast=False), grad)
        if ctx.needs_input_grad[1]:
            grad_nm, x_km = grad_fp8.t().contiguous(), x_fp8.t().contiguous()
            grad_weight = multiply(grad_nm, x_km, (scale_g, scale_x), weight_dtype, is_fast=False)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_rows(grad).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None
