"""The update of all members of a bundle at once: clipping and the optimizer, each row with its own numbers.

Formulas are those of `torch.optim` (SGD with momentum, Adam, AdamW) and of `torch.nn.utils.clip_grad_norm_`. A row that
is not alive keeps everything as it is, whatever its gradient says, so nobody has to wait to know. Works on the matrices
of `stacked.Stacked` in place; called by the bundle, eagerly, recorded or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.train.bundle.stacked import Stacked

SGD_NUMBERS = ("lr", "weight_decay", "momentum")
ADAM_NUMBERS = ("lr", "weight_decay", "beta1", "beta2", "eps")


@dataclass(frozen=True, slots=True)
class Clip:
    """Per row the largest norm and element of a gradient, infinite for none; None where no row has any."""

    norms: Tensor | None
    values: Tensor | None

    @classmethod
    def of(cls, norms: Sequence[float | None], values: Sequence[float | None], device: torch.device) -> Clip:
        """From what each row's training declares."""
        return cls(_limits(norms, device), _limits(values, device))


class Update:
    """What ends a step.

    Args:
        stacked: parameters and state.
        optimizer: one member's; all are alike in kind.
        clip: of each row.
        compile: compiles a function, or leaves it as it is.
    """

    def __init__(
        self,
        stacked: Stacked,
        optimizer: torch.optim.Optimizer,
        clip: Clip,
        compile: Callable[[Any], Any] = lambda function: function,
    ) -> None:
        self._stacked, self._clip = stacked, clip
        self._is_adam = not isinstance(optimizer, torch.optim.SGD)
        first = optimizer.param_groups[0]
        self._is_decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(first.get("decoupled_weight_decay"))
        self._is_nesterov = bool(first.get("nesterov"))
        self._has_momentum = bool(stacked.first.numel())
        self._clipped, self._adam, self._sgd = compile(_clipped), compile(_adam), compile(_sgd)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the numbers that each group has."""
        return ADAM_NUMBERS if self._is_adam else SGD_NUMBERS

    def numbers_of(self, group: dict[str, Any]) -> list[float]:
        """These numbers as a group of the optimizer has them."""
        if not self._is_adam:
            return [float(group[name]) for name in SGD_NUMBERS]
        beta1, beta2 = group["betas"]
        return [float(each) for each in (group["lr"], group["weight_decay"], beta1, beta2, group["eps"])]

    def norms(self, grads: Tensor, weight: float) -> Tensor:
        """The norm of each row's gradient, before it is clipped, (K,)."""
        norms: Tensor = torch.linalg.vector_norm(grads, dim=1)
        return norms * weight

    def apply(self, grads: Tensor, weight: float, norms: Tensor, alive: Tensor, numbers: Tensor) -> None:
        """Clip and update rows that are alive.

        Args:
            grads: (K, N), to be multiplied by `weight`; used up.
            weight: makes means of sums.
            norms: of its rows, weighted.
            alive: 1.0 or 0.0 for each row.
            numbers: (groups, numbers, K).
        """
        stacked = self._stacked
        self._clipped(grads, weight, norms, alive, self._clip)
        stacked.steps.add_(alive)
        for index, group in enumerate(stacked.groups):
            part = slice(group.begin, group.end)
            values, own = stacked.values[:, part], numbers[index]
            if self._is_adam:
                moments = stacked.first[:, part], stacked.second[:, part]
                self._adam(values, grads[:, part], moments, stacked.steps, alive, own, self._is_decoupled)
            else:
                momentum = stacked.first[:, part] if self._has_momentum else None
                self._sgd(values, grads[:, part], momentum, alive, own, self._is_nesterov)


def _limits(limits: Sequence[float | None], device: torch.device) -> Tensor | None:
    if all(limit is None for limit in limits):
        return None
    return torch.tensor([float("inf") if limit is None else limit for limit in limits], device=device)


def _clipped(grads: Tensor, weight: float, norms: Tensor, alive: Tensor, clip: Clip) -> None:
    """Weigh and clip rows in place, and put zeros where a row is not alive."""
    if clip.values is not None:
        limits = clip.values[:, None] / weight
        grads.copy_(torch.minimum(torch.maximum(grads, -limits), limits))
        norms = torch.linalg.vector_norm(grads, dim=1) * weight
    factor = torch.full_like(norms, weight)
    if clip.norms is not None:
        factor = factor * torch.clamp(clip.norms / (norms + 1e-6), max=1.0)
    # Not a product with zero: of a gradient that is not finite that would be none.
    grads.mul_(factor[:, None]).masked_fill_(alive[:, None] == 0, 0.0)


def _sgd(
    values: Tensor, grads: Tensor, momentum: Tensor | None, alive: Tensor, numbers: Tensor, is_nesterov: bool
) -> None:
    lr, decay, keep = (number[:, None] for number in numbers)
    is_alive = alive[:, None]
    direction = torch.addcmul(grads, values, decay * is_alive)
    if momentum is not None:
        momentum.mul_(torch.where(is_alive > 0, keep, 1.0)).add_(direction)
        direction = torch.addcmul(direction, momentum, keep) if is_nesterov else momentum
    values.addcmul_(direction, -lr * is_alive)


def _adam(
    values: Tensor,
    grads: Tensor,
    moments: tuple[Tensor, Tensor],
    steps: Tensor,
    alive: Tensor,
    numbers: Tensor,
    is_decoupled: bool,
) -> None:
    lr, decay, beta1, beta2, eps = (number[:, None] for number in numbers)
    is_alive, count = alive[:, None], steps.clamp(min=1.0)[:, None]
    first, second = moments
    if is_decoupled:
        values.mul_(1.0 - lr * decay * is_alive)
    else:
        grads = torch.addcmul(grads, values, decay * is_alive)
    first.lerp_(grads, (1.0 - beta1) * is_alive)
    second.lerp_(grads * grads, (1.0 - beta2) * is_alive)
    rate = is_alive * lr / (1.0 - beta1**count)
    moves = rate > 0
    # What is divided by has the rate in it, for one pass over all parameters less; infinite where nothing shall move.
    scale = torch.where(moves, 1.0 / (rate * (1.0 - beta2**count).sqrt()), 0.0)
    shift = torch.where(moves, eps / rate, float("inf"))
    values.addcdiv_(first, torch.addcmul(shift, second.sqrt(), scale), value=-1.0)
