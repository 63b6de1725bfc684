"""Linear layers in int8: a scale per row, gradients rounded stochastically, a real integer product where there is one.

One quantised copy of each operand serves all three products: the scale that varies along the dimension a product sums
over is multiplied into the gradient before that is quantised, so nothing is rounded twice. Kept for the backward pass
are the int8 input with its scales and the fp32 weight, which exists anyway. Called through `products`.

Shapes: M rows (tokens), K inputs, N outputs. GPUs want K and N in multiples of 8 (the layer falls back) and more than
16 rows in multiples of 8 (rows of zeros are added).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from orchestrator.hardware import cpu_facts
from orchestrator.policies.tier import Tier, support_of
from orchestrator.train.precision.half import exact_linear, filled_rows, result_dtype, sum_rows, unfilled
from orchestrator.train.precision.rounding import round_stochastically

ALIGNMENT = 8
_MIN_ROWS = 24
LARGEST = 127.0
_SMALLEST_AMAX = 1e-12


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All three products of the layer on int8 operands."""
    product: Tensor = _Int8Products.apply(x, weight, bias, result_dtype(x))  # type: ignore[no-untyped-call]
    return product


@cache
def has_unit(device: torch.device) -> bool:
    """Whether the device multiplies int8 itself, and faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    return device.type == "cpu" and support_of(Tier.INT8, cpu_facts()).is_real


def quantise(x_mk: Tensor, *, is_stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """int8 and, for each row, what one unit of it is worth, (M, 1)."""
    scale_m1 = x_mk.abs().amax(dim=1, keepdim=True).float().clamp(min=_SMALLEST_AMAX) / LARGEST
    scaled = x_mk.float() / scale_m1
    return _whole(scaled, is_stochastic=is_stochastic), scale_m1


def _whole(scaled: Tensor, *, is_stochastic: bool) -> Tensor:
    units = round_stochastically(scaled) if is_stochastic else scaled.round()
    return units.clamp(-LARGEST, LARGEST).to(torch.int8)


def multiply(a_mk: Tensor, b_nk: Tensor) -> Tensor:
    """The product a @ b.T of two int8 tensors as fp32; exact in int32 where there is a unit."""
    if not has_unit(a_mk.device):
        return exact_linear(a_mk.float(), b_nk.float())
    return torch._int_mm(a_mk, b_nk.t()).float()


@torch._dynamo.allow_in_graph
class _Int8Products(torch.autograd.Function):
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
        x_int8, scale_m1 = quantise(filled_rows(x, ALIGNMENT, _MIN_ROWS))
        w_int8, scale_n1 = quantise(weight_nk)
        y_mn = multiply(x_int8, w_int8) * scale_m1 * scale_n1.t()
        ctx.save_for_backward(x_int8, scale_m1, weight_nk, scale_n1)
        ctx.dtypes = (x.dtype, weight_nk.dtype, None if bias_n is None else bias_n.dtype)
        y = unfilled(y_mn, x)
        return (y if bias_n is None else y + bias_n).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The other two products, of the gradient times the scale that they sum over."""
        x_int8, scale_m1, weight_nk, scale_n1 = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_mn = filled_rows(grad, ALIGNMENT, _MIN_ROWS).float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            w_kn = _whole(weight_nk.float() / scale_n1, is_stochastic=False).t().contiguous()
            g_int8, scale_g = quantise(grad_mn * scale_n1.t(), is_stochastic=True)
            grad_x = unfilled(multiply(g_int8, w_kn) * scale_g, grad).to(x_dtype)
        if ctx.needs_input_grad[1]:
            g_int8, scale_g = quantise((grad_mn * scale_m1).t().contiguous(), is_stochastic=True)
            grad_weight = (multiply(g_int8, x_int8.t().contiguous()) * scale_g).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_rows(grad).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None
