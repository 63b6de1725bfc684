"""The linear layer of all members of a bundle: one batched product with the bias in it, and three for its gradient.

Under `torch.func.vmap` alone a bias would be added behind the product, rounded twice where the product is in 16 bits,
and its gradient summed in 16 bits. Here it is what `precision.half` computes for a trial alone, for all at once.
Set as the function of a bundle's linear layers; called inside of vmap, seen by ordinary autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orchestrator.train.precision.half import result_dtype


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The three products in bf16; answers in the dtype in which the layer answers alone."""
    found: Tensor = _Folded.apply(x, weight, bias, torch.bfloat16, result_dtype(x))  # type: ignore[no-untyped-call]
    return found


def full_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The three products in the dtype of the operands; on a GPU in tf32 where the process has that switched on."""
    found: Tensor = _Folded.apply(x, weight, bias, weight.dtype, result_dtype(x))  # type: ignore[no-untyped-call]
    return found


class _Folded(torch.autograd.Function):
    """Brings the members together; what is done with them is recorded by ordinary autograd."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
        """Never called: there is always a bundle around it."""
        raise NotImplementedError("a linear layer of a bundle outside of one")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        """Nothing to keep."""

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, int]:
        """Members are the first dimension of what comes back."""
        num_rows = info.batch_size
        x, weight = (_rows(each, dim, num_rows) for each, dim in zip((x, weight), in_dims, strict=False))
        bias = None if bias is None else _rows(bias, in_dims[2], num_rows)
        flat = x.reshape(num_rows, -1, x.shape[-1])
        found: Tensor = _Products.apply(flat, weight, bias, dtype)  # type: ignore[no-untyped-call]
        return found.to(out_dtype).view(*x.shape[:-1], -1), 0


class _Products(torch.autograd.Function):
    """x_KMI @ weight_KOI.T + bias_KO, all three products on operands of one dtype; gradients of weights in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        """The product, the bias within it."""
        x_low, weight_low = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x_low, weight_low)
        ctx.x_dtype, ctx.has_bias = x.dtype, bias is not None
        with torch.autocast(x.device.type, enabled=False):
            if bias is None:
                return torch.bmm(x_low, weight_low.mT)
            return torch.baddbmm(bias.to(dtype)[:, None], x_low, weight_low.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of input, weight and bias."""
        x_low, weight_low = ctx.saved_tensors
        grad_low, grad_x = grad.to(x_low.dtype), None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = torch.bmm(grad_low, weight_low).to(ctx.x_dtype)
            grad_weight = torch.bmm(grad_low.mT, x_low).float()
        grad_bias = grad.sum(1, dtype=torch.float32) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None


def _rows(x: Tensor, dim: int | None, num_rows: int) -> Tensor:
    return x.unsqueeze(0).expand(num_rows, *x.shape) if dim is None else x.movedim(dim, 0)
