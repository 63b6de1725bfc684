"""How the products of a linear layer are computed in each precision tier: one function per tier, in one table.

Every function takes (input, weight, bias) as `torch.nn.functional.linear` does and returns the input's dtype, whatever
it computes in: a layer of another kind may follow. Weights stay fp32 masters and their gradients arrive in fp32.
Deliberately ignorant of models, ranks and of when a tier changes; called by `PrecisionLinear.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from policies.tier import Tier

LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Bf16Products(torch.autograd.Function):
    """x_MK @ weight_NK.T with the forward, input-gradient and weight-gradient products all on bf16 operands.

    For the backward pass it keeps the input in bf16 (half of what fp32 keeps) and the fp32 weight itself, which exists
    anyway and is cast again: a kept bf16 copy would be 2 more bytes per parameter and, under FSDP2, would hold the
    unsharded weight in memory after the sharded one was freed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:  # noqa: ANN401
        """The product in the input's dtype; keeps the operands that some gradient will ask for."""
        x_bf16 = x.to(torch.bfloat16)
        bias_bf16 = None if bias_n is None else bias_n.to(torch.bfloat16)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_bf16 if needs_weight else None, weight_nk if needs_x else None)
        ctx.dtypes = (x.dtype, weight_nk.dtype, None if bias_n is None else bias_n.dtype)
        return F.linear(x_bf16, weight_nk.to(torch.bfloat16), bias_bf16).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        """Gradients of input, weight and bias, each in the dtype of what it belongs to."""
        x_bf16, weight_nk = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_bf16 = grad.to(torch.bfloat16)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_bf16 @ weight_nk.to(torch.bfloat16)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            grad_mn, x_mk = grad_bf16.reshape(-1, grad.shape[-1]), x_bf16.reshape(-1, x_bf16.shape[-1])
            grad_weight = (grad_mn.t() @ x_mk).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            # A sum is no matrix product: taken from the gradient as it came, it costs the same and rounds less.
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias


def fp32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain product, in the dtype of its operands."""
    return F.linear(x, weight, bias)


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All three products of the layer in bf16, result in the input's dtype."""
    product: Tensor = _Bf16Products.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


TIER_FUNCTIONS: dict[Tier, LinearFunction] = {
    Tier.FP32: fp32_linear,
    Tier.BF16: bf16_linear,
}
