"""The gradient noise of a trial, estimated from the gradients of two consecutive steps.

The differenced estimator works for any world size and accumulation, because it needs nothing but what every rank holds
anyway: its shard of the averaged gradient. Knows no model, policy or schedule; the loop feeds it before it clips.
Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1 (estimators of |G|^2 and tr(Sigma) from two batches);
differencing as in AdaptDL, OSDI 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseEstimate:
    """One draw of both noise terms. Single draws scatter widely: average each over many before dividing.

    Attributes:
        noise_trace: tr(Sigma), the variance of one sample's gradient summed over parameters, >= 0.
        grad_sq: |G|^2, the squared norm of the true gradient; one draw may be negative.
    """

    noise_trace: float
    grad_sq: float


class NoiseEstimator:
    """Estimates both noise terms from two consecutive steps out of every `every`.

    With g1, g2 the gradients at global batch B: L = (|g1|^2 + |g2|^2) / 2, T = |(g1 + g2) / 2|^2,
    |G|^2 = 2 T - L = <g1, g2> and tr(Sigma) = (L - T) 2 B = B |g1 - g2|^2 / 2. The right-hand forms are computed: they
    are the same numbers without cancellation. Weights move between the two steps, which adds to tr(Sigma) what one
    step changes of the gradient.

    It holds one copy of the local gradients between the two steps of a pair, and nothing at other times.
    """

    def __init__(self, every: int = 20) -> None:
        """Measure in steps n with n % every in (0, 1).

        Raises:
            ValueError: `every` is below 2: a pair takes two steps.
        """
        if every < 2:
            raise ValueError(f"every={every} leaves no room for a pair of steps; allowed: >= 2")
        self._every = every
        self._held: list[Tensor] | None = None
        self._held_batch = 0

    def wants(self, step: int) -> bool:
        """Whether `observe` is to be called in `step`. Ask in every step: it also drops what a skipped step left."""
        phase = step % self._every
        if phase != 1:
            self._held = None
        return phase == 0 or (phase == 1 and self._held is not None)

    def reset(self) -> None:
        """Forget the first half of a pair: after a change of batch or tier, or a step that was skipped."""
        self._held = None

    def observe(
        self, local_grads: Sequence[Tensor], global_batch: int, group: dist.ProcessGroup | None = None
    ) -> NoiseEstimate | None:
        """Take the gradients of a step, averaged over `global_batch` samples, unscaled and unclipped.

        Args:
            local_grads: this rank's disjoint shards, as `fsdp.local_grads` returns them.
            global_batch: samples behind the averaged gradient.
            group: the ranks that hold the other shards; None where this rank holds everything.

        Returns:
            The estimate, the same on every rank, on the second step of a pair; None on the first, after a change of
            batch in between, and where a gradient is not finite. Only the second step waits for the device.
        """
        if self._held is None or self._held_batch != global_batch:
            self._held = [grad.detach().clone() for grad in local_grads]
            self._held_batch = global_batch
            return None
        held, self._held = self._held, None
        if len(held) != len(local_grads):
            raise ValueError(
                f"{len(local_grads)} gradients after {len(held)} in the step before; allowed: the same parameters in "
                "both steps of a pair; call reset() when they change"
            )
        grad_sq, difference_sq = _reduced(_products(held, local_grads), group)
        if not (math.isfinite(grad_sq) and math.isfinite(difference_sq)):
            return None
        return NoiseEstimate(noise_trace=0.5 * global_batch * difference_sq, grad_sq=grad_sq)


def _products(held: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """(<held, grads>, |held - grads|^2) as two float64 numbers on the tensors' device; `held` is used up."""
    if not held:
        return torch.zeros(2, dtype=torch.float64)
    dots, differences = [], []
    for before, now in zip(held, grads, strict=True):
        flat_before, flat_now = before.flatten(), now.detach().flatten()
        dots.append(torch.dot(flat_before, flat_now))
        flat_before -= flat_now
        differences.append(torch.dot(flat_before, flat_before))
    # Summing some hundred terms in double costs nothing and keeps small layers from being rounded away.
    return torch.stack([torch.stack(dots).double().sum(), torch.stack(differences).double().sum()])


def _reduced(values: Tensor, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Both numbers summed over the ranks of `group`."""
    if group is not None:
        values = values.cpu() if dist.get_backend(group) == dist.Backend.GLOO else values
        dist.all_reduce(values, group=group)
    first, second = values.tolist()
    return first, second
