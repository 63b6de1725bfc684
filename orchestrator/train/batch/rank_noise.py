"""The gradient noise seen within one step: how much the gradients of the ranks differ; and how they are exchanged.

FSDP2 hands a rank its shard of the averaged gradient only. What the ranks had before that is seen by the public hook
`FSDPModule.set_custom_reduce_scatter`: `Observed` is the reduce-scatter that FSDP2 uses by itself, and in a step that
is measured it looks at its input first. Nothing is kept between steps, and weights do not move within one.

The same hook can send gradients in another dtype, from one step to the next. FSDP2's own way, `reduce_dtype` of its
policy, is fixed when a model is wrapped: there is no public setter, and wrapping again makes a new module.
Knows no schedule and no policy; `orchestrator.train.batch.meter` calls it.
Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1, for parts of uneven size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from orchestrator.train.batch.noise import NoiseEstimate, reduced

# torch 2.13 gave the function a new name, and warns of the old one.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Observed:
    """FSDP2's reduce-scatter, which in an armed step also adds up the squares of what the ranks bring.

    Attributes:
        is_armed: whether the next call is measured.
        is_elementwise: whether the squares are wanted for each element (to be weighed), which costs a second
            reduce-scatter; otherwise their sum is enough.
        dtype: in which gradients travel and are added up; None for their own.
        found: for each call of a measured step the reduced gradient, and the squares: one number, or one for each
            element of the gradient, summed over the ranks.
    """

    def __init__(self) -> None:
        self.is_armed = False
        self.is_elementwise = False
        self.dtype: torch.dtype | None = None
        self.found: list[tuple[Tensor, Tensor]] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for the collective, as FSDP2 makes it."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce and scatter `input_tensor`."""
        if self.is_armed:
            self.found.append((output_tensor, self._squares(output_tensor, input_tensor, group)))
        if self.dtype is not None and self.dtype != input_tensor.dtype:
            sent = input_tensor.to(self.dtype)
            received = torch.empty_like(output_tensor, dtype=self.dtype)
            _reduce_scatter(received, sent, op=op, group=group)
            output_tensor.copy_(received)
            return None
        work: dist.Work | None = _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return work

    def _squares(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        if not self.is_elementwise:
            return torch.dot(input_tensor, input_tensor)
        squares = torch.empty_like(output_tensor)
        _reduce_scatter(squares, input_tensor.square(), op=dist.ReduceOp.SUM, group=group)
        return squares


class RankNoise:
    """Estimates both noise terms from the ranks' own gradients, in one step out of every `every`."""

    def __init__(self, model: nn.Module, every: int = 20) -> None:
        """Put the hook into every sharded module of `model`."""
        self._every = every
        self._hook = Observed()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(self._hook)  # type: ignore[arg-type]  # the base class is private

    def wants(self, step: int) -> bool:
        """Whether `step` is measured."""
        return step % self._every == 0

    def exchange_in(self, dtype: torch.dtype | None) -> None:
        """Send gradients in `dtype` from the next backward pass on, None for their own; on every rank alike."""
        self._hook.dtype = dtype

    def arm(self, *, is_elementwise: bool) -> None:
        """Measure the next backward pass that reduces gradients."""
        self._hook.is_armed, self._hook.is_elementwise = True, is_elementwise
        self._hook.found.clear()

    def reset(self) -> None:
        """Measure nothing, and forget what was seen."""
        self._hook.is_armed = False
        self._hook.found.clear()

    def observe(
        self,
        local_grads: Sequence[Tensor],
        counts: Sequence[int],
        group: dist.ProcessGroup | None,
        *,
        grad_scale: float = 1.0,
        squares_scale: float = 1.0,
        weights: Sequence[Tensor] | None = None,
    ) -> NoiseEstimate | None:
        """What the armed step showed.

        Args:
            local_grads: this rank's shards of the reduced gradient, as `fsdp.local_grads` returns them.
            counts: samples of each rank.
            group: the ranks.
            grad_scale: what the loss was multiplied with, where the gradients still are.
            squares_scale: the same where `local_grads` were divided by it after they had been reduced.
            weights: the preconditioner, one tensor for each gradient; None or empty for plain gradients.

        Returns:
            The estimate, the same on every rank; None where a gradient is not finite or too few ranks had samples.
        """
        found = list(self._hook.found)
        self.reset()
        total = sum(counts)
        spread = total**2 - sum(count**2 for count in counts)
        if not found or spread == 0:
            return None
        whole = torch.zeros(2, dtype=torch.float64, device=local_grads[0].device)
        if weights:
            for grad, weight in zip(local_grads, weights, strict=True):
                squares = _squares_of(grad, found)
                if grad.numel():
                    whole[0] += (grad * weight).square().sum(dtype=torch.float64)
                    whole[1] += (squares * weight.square()).sum(dtype=torch.float64)
        else:
            whole[0] = sum((grad.square().sum(dtype=torch.float64) for grad in local_grads), start=whole[0])
            whole[1] = sum((squares.double() for _, squares in found), start=whole[1])
        reduced_sq, ranks_sq = reduced(whole, group)
        if not (math.isfinite(reduced_sq) and math.isfinite(ranks_sq)):
            return None
        # Of sums over samples instead of means: that of rank r has the expectation c_r^2 |G|^2 + c_r tr(Sigma). A
        # rank's gradient is (number of ranks / total) times its sum.
        sum_sq = total**2 * reduced_sq / grad_scale**2
        parts_sq = (total / len(counts)) ** 2 * ranks_sq / (grad_scale * squares_scale) ** 2
        grad_sq = (sum_sq - parts_sq) / spread
        squared_counts = sum(count**2 for count in counts)
        return NoiseEstimate(noise_trace=(parts_sq - squared_counts * grad_sq) / total, grad_sq=grad_sq)


def _squares_of(grad: Tensor, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The part of the squares that belongs to a gradient: it is a view of the reduced gradient that has the same place.

    Raises:
        ValueError: it is no view of any; FSDP2 would have to accumulate or cast gradients, which nobody asks it for.
    """
    for whole, squares in found:
        if whole.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr():
            return squares.as_strided(grad.size(), grad.stride(), grad.storage_offset())
    if grad.numel() == 0:
        return grad
    raise ValueError(f"a gradient of shape {tuple(grad.shape)} is not part of what was reduced in this step")
