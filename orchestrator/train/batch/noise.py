"""The gradient noise of a trial, estimated from gradients that are computed anyway.

Three estimators with one result. `HalfNoise` compares the two halves of the samples of one step, on one rank;
`orchestrator.train.batch.rank_noise` compares the ranks within one step; `RecordedPair` compares two consecutive
steps and is for steps that are replayed and cannot be cut. All may weigh gradients with Adam's preconditioner
(`weights_of`), because that is the geometry in which Adam moves.
Knows no model, policy or schedule. Fed after the backward pass and before clipping.
Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1 (estimators of |G|^2 and tr(Sigma) from two batches);
differencing and preconditioning as in AdaptDL, OSDI 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.train.fsdp import local_part


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseEstimate:
    """One draw of both noise terms. Single draws scatter widely: average each over many before dividing.

    Attributes:
        noise_trace: tr(Sigma), the variance of one sample's gradient summed over parameters; one draw that compares
            ranks may be negative.
        grad_sq: |G|^2, the squared norm of the true gradient; one draw may be negative.
    """

    noise_trace: float
    grad_sq: float


class HalfNoise:
    """Estimates both noise terms from the two halves of one step's samples, at the same weights.

    With a, b the mean gradients of n and m samples: |G|^2 = <a, b> and tr(Sigma) = |a - b|^2 / (1 / n + 1 / m). Two
    steps would do as well if weights did not move in between: a step turns the next gradient away from its own, so that
    |G|^2 comes out too small and the noise scale too large.

    It holds one copy of the local gradients from the middle of a step to its end.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] | None = None
        self._count = 0

    def reset(self) -> None:
        """Forget the first half: its step was broken off."""
        self._held = None

    def hold(self, local_grads: Sequence[Tensor], count: int, *, grad_scale: float = 1.0) -> None:
        """Take what the first `count` samples have added to the gradients, multiplied by `grad_scale` as they are."""
        self._held, self._count = [grad.detach() / grad_scale for grad in local_grads], count

    def rescale(self, factor: float) -> None:
        """Multiply what is held, as the gradients of the step were."""
        for held in self._held or ():
            held *= factor  # noqa: PLW2901 - in place

    def observe(
        self, local_grads: Sequence[Tensor], global_batch: int, *, weights: Sequence[Tensor] | None = None
    ) -> NoiseEstimate | None:
        """Take the gradients of the whole step, averaged over `global_batch` samples, unscaled and unclipped.

        Returns:
            The estimate; None where nothing was held, a parameter has a gradient from one half only, or one is not
            finite.
        """
        held, self._held = self._held, None
        first, second = self._count, global_batch - self._count
        if held is None or len(held) != len(local_grads) or first < 1 or second < 1:
            return None
        for before in held:
            before *= global_batch / first  # noqa: PLW2901 - in place
        others = (
            (now.detach() - before * (first / global_batch)) * (global_batch / second)
            for before, now in zip(held, local_grads, strict=True)
        )
        grad_sq, difference_sq = _products(held, others, weights).tolist()
        if not (math.isfinite(grad_sq) and math.isfinite(difference_sq)):
            return None
        return NoiseEstimate(noise_trace=difference_sq / (1 / first + 1 / second), grad_sq=grad_sq)


class RecordedPair:
    """Both noise terms from two consecutive steps, as two pieces of device work that wait for nothing.

    So they can be recorded: `hold` keeps a copy of the gradients of one step; `compare`, in the next one, writes
    <g1, g2> and |g1 - g2|^2 to the tensor it is given. Gradients, weights and the copy stay where they are.

    With g1, g2 the gradients at global batch B: L = (|g1|^2 + |g2|^2) / 2, T = |(g1 + g2) / 2|^2,
    |G|^2 = 2 T - L = <g1, g2> and tr(Sigma) = (L - T) 2 B = B |g1 - g2|^2 / 2. The right-hand forms are computed: they
    are the same numbers without cancellation. Weights move between the two steps, which adds to tr(Sigma) what one
    step changes of the gradient.

    Args:
        params: of the trial, all on one device and unsharded.
        optimizer: it has stepped before anything is recorded, so that Adam's second moments exist.
    """

    def __init__(self, params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._params, self._optimizer = list(params), optimizer
        self._held: list[Tensor] = []

    def make_room(self) -> None:
        """Make the copies, before anything is recorded: what a recording makes itself, another one may overwrite."""
        if not self._held:
            self._held = [torch.zeros_like(param) for param in self._params]

    def drop(self) -> None:
        """Give the copies back; what was recorded with them must be forgotten as well."""
        self._held = []

    def hold(self) -> None:
        """Keep the gradients of this step."""
        for held, param in zip(self._held, self._params, strict=True):
            if param.grad is not None:
                held.copy_(param.grad)

    def compare(self, found: Tensor) -> None:
        """Compare the gradients of this step with those that were kept, which are used up; `found` has two elements."""
        pairs = [(held, param.grad) for held, param in zip(self._held, self._params, strict=True)]
        used = [(held, grad) for held, grad in pairs if grad is not None]
        weights = weights_of(self._optimizer, self._params)
        found.copy_(_products([held for held, _ in used], [grad for _, grad in used], weights))

    @staticmethod
    def estimate(found: tuple[float, float], global_batch: int) -> NoiseEstimate | None:
        """The estimate that follows from what `compare` found; None where a gradient was not finite."""
        grad_sq, difference_sq = found
        if not (math.isfinite(grad_sq) and math.isfinite(difference_sq)):
            return None
        return NoiseEstimate(noise_trace=0.5 * global_batch * difference_sq, grad_sq=grad_sq)


def weights_of(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[Tensor] | None:
    """Adam's preconditioner 1 / (sqrt(v_hat) + eps) of each parameter that has a gradient, this rank's shard of it.

    Damped by the root mean square of the tensor: an element that hardly ever has a gradient (the embedding of a rare
    byte) would otherwise weigh millions, although Adam's own step is bounded by the gradient that comes. Empty for an
    optimizer without second moments (SGD), None while Adam has none yet, before its first step.
    """
    weights: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        held = [param for param in group["params"] if param.grad is not None]
        if held and "betas" not in group:
            return []
        if any("exp_avg_sq" not in optimizer.state.get(param, {}) for param in held):
            return None
        if held:
            weights |= zip(map(id, held), _group_weights(optimizer, group, held), strict=True)
    return [weights[id(param)] for param in params if param.grad is not None]


def _group_weights(optimizer: torch.optim.Optimizer, group: dict[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
    """The preconditioner of the parameters of one group, in few operations for each: it is computed between steps."""
    states: list[dict[str, Any]] = [optimizer.state[param] for param in params]
    steps = torch.stack([torch.as_tensor(state["step"], dtype=torch.float32) for state in states])
    corrections = (1.0 - float(group["betas"][1]) ** steps).sqrt_().unbind()
    weights = []
    for state, correction in zip(states, corrections, strict=True):
        second = local_part(state["exp_avg_sq"].detach())
        root = second.sqrt()
        if root.numel():  # the mean square of the roots is the mean of the second moments
            root.add_(second.mean().sqrt_() + float(group["eps"]) * correction)
        weights.append(torch.div(correction, root, out=root))
    return weights


def _products(held: Sequence[Tensor], grads: Iterable[Tensor], weights: Sequence[Tensor] | None) -> Tensor:
    """(<held, grads>, |held - grads|^2) as two float64 numbers on the tensors' device; `held` is used up."""
    if not held:
        return torch.zeros(2, dtype=torch.float64)
    dots, differences = [], []
    for index, (before, now) in enumerate(zip(held, grads, strict=True)):
        flat_before, flat_now = before.flatten(), now.detach().flatten()
        if weights:
            flat_weights = weights[index].flatten()
            flat_before *= flat_weights
            flat_now = flat_now * flat_weights
        dots.append(torch.dot(flat_before, flat_now))
        flat_before -= flat_now
        differences.append(torch.dot(flat_before, flat_before))
    # Summing some hundred terms in double costs nothing and keeps small layers from being rounded away.
    return torch.stack([torch.stack(dots).double().sum(), torch.stack(differences).double().sum()])


def reduced(values: Tensor, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Both numbers summed over the ranks of `group`."""
    if group is not None:
        values = values.cpu() if dist.get_backend(group) == dist.Backend.GLOO else values
        dist.all_reduce(values, group=group)
    first, second = values.tolist()
    return first, second
