"""Linear layers in 16 bits (bf16, fp16) and, emulated, in tf32: one autograd function for the three products.

Compiled, those of 16 bits are plain casts and a product: torch.compile sees what is kept and cast, and fuses it, and
torch keeps on disk only what it made of graphs without such functions. A process that reads them from there, instead
of tracing the model's backward pass again, is ready in a third of the time (34 M language model on an H200, alone).

Takes (input, weight, bias) as `torch.nn.functional.linear` does. Weights stay fp32 masters and their gradients arrive
in fp32. Called by `PrecisionLinear.forward` through `products`; ignorant of models, ranks and of when a tier changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from orchestrator.train.precision.rounding import to_tf32


def result_dtype(x: Tensor) -> torch.dtype:
    """What a layer answers with: under autocast its dtype, as every layer of torch does; else the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        lowered: torch.dtype = torch.get_autocast_dtype(device)
        return lowered
    return x.dtype


def half_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, keeps_weight: bool = False
) -> Tensor:
    """All three products of the layer on operands of `dtype`; `keeps_weight` casts the weight once, not twice."""
    if torch.compiler.is_compiling():
        bias_half = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias_half).to(result_dtype(x))
    arguments = (x, weight, bias, dtype, result_dtype(x), keeps_weight)
    product: Tensor = _HalfProducts.apply(*arguments)  # type: ignore[no-untyped-call]
    return product


def tf32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The three products in tf32: by the tensor cores of a GPU (a switch of the process), elsewhere emulated."""
    if x.is_cuda:
        return F.linear(x, weight, bias)
    product: Tensor = _Tf32Products.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


class _HalfProducts(torch.autograd.Function):
    """x_MK @ weight_NK.T with the forward, input-gradient and weight-gradient products all on 16-bit operands.

    For the backward pass it keeps the input in 16 bits (half of what fp32 keeps) and either the cast weight, 2 more
    bytes per parameter until then, or the fp32 weight itself, which is cast again: under FSDP2 a kept copy would be a
    whole weight that stays in memory after the gathered one was freed.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight_nk: Tensor,
        bias_n: Tensor | None,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        keeps_weight: bool,
    ) -> Tensor:
        """The product in `out_dtype`; keeps the operands that some gradient will ask for."""
        x_half, weight_half = x.to(dtype), weight_nk.to(dtype)
        bias_half = None if bias_n is None else bias_n.to(dtype)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        weight_kept = weight_half if keeps_weight else weight_nk
        ctx.save_for_backward(x_half if needs_weight else None, weight_kept if needs_x else None)
        ctx.dtypes = (x.dtype, weight_nk.dtype, None if bias_n is None else bias_n.dtype, dtype)
        return F.linear(x_half, weight_half, bias_half).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of input, weight and bias, each in the dtype of what it belongs to."""
        x_half, weight_kept = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype, dtype = ctx.dtypes
        grad_half = grad.to(dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_half @ weight_kept.to(dtype)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            grad_mn, x_mk = grad_half.reshape(-1, grad.shape[-1]), x_half.reshape(-1, x_half.shape[-1])
            grad_weight = (grad_mn.t() @ x_mk).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_rows(grad).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


class _Tf32Products(torch.autograd.Function):
    """The three products in fp32 on operands rounded as a tensor core rounds them; no speed, the same numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:  # noqa: ANN401
        """The product of the rounded operands."""
        x_tf32, weight_tf32 = to_tf32(x.float()), to_tf32(weight_nk.float())
        ctx.save_for_backward(x_tf32, weight_tf32)
        ctx.dtypes = (x.dtype, weight_nk.dtype, None if bias_n is None else bias_n.dtype)
        y = exact_linear(x_tf32, weight_tf32)
        return (y if bias_n is None else y + bias_n).to(result_dtype(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: ANN401
        """The other two products, of the rounded gradient."""
        x_tf32, weight_tf32 = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_tf32 = to_tf32(grad.float())
        grad_x = exact_linear(grad_tf32, weight_tf32.t()).to(x_dtype)
        grad_weight = exact_linear(rows(grad_tf32).t(), rows(x_tf32).t()).to(weight_dtype)
        return grad_x, grad_weight, None if bias_dtype is None else sum_rows(grad).to(bias_dtype)


def exact_linear(a: Tensor, b_nk: Tensor) -> Tensor:
    """The product a @ b.T in the operands' own dtype, whatever autocast would make of it."""
    with torch.autocast(a.device.type, enabled=False):
        return F.linear(a, b_nk)


def rows(x: Tensor) -> Tensor:
    """All leading dimensions as one: (M, K)."""
    return x.reshape(-1, x.shape[-1])


def filled_rows(x: Tensor, multiple: int, least: int = 0) -> Tensor:
    """`rows` with rows of zeros added up to a multiple, `least` of them in all: integer and fp8 units want that."""
    x_mk = rows(x)
    missing = max(-x_mk.shape[0] % multiple, least - x_mk.shape[0])
    return F.pad(x_mk, (0, 0, 0, missing)) if missing else x_mk


def unfilled(y_mn: Tensor, like: Tensor) -> Tensor:
    """The inverse: without the rows that were added, in the leading dimensions of `like`."""
    num_rows = like.numel() // like.shape[-1] if like.shape[-1] else 0
    return y_mn[:num_rows].reshape(*like.shape[:-1], y_mn.shape[1])


def sum_rows(grad: Tensor) -> Tensor:
    """The gradient of a bias. A sum is no matrix product: of the gradient as it came it costs the same, rounds less.

    On a CPU torch would write the whole gradient out in fp32 first. A sum of bf16 is formed in fp32 there as well, and
    is off by no more than the gradient of a weight, which is a product in bf16.
    """
    grad_mn = rows(grad)
    is_direct = grad.dtype is torch.bfloat16 and grad.device.type == "cpu"
    return grad_mn.sum(0).float() if is_direct else grad_mn.sum(0, dtype=torch.float32)
