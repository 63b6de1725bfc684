"""The gradient of one step: forward and backward passes over a rank's samples, micro-batch by micro-batch.

However the samples are cut, the gradient is that of the mean loss over all elements of the global batch. Where their
number is known only with the batch (padded text), gradients add up under a provisional one and are corrected at the
end. Knows no cursor, no learning rate and no optimizer; called by the stepper.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.training import Training
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train import fsdp
from orchestrator.train.batch.meter import NoiseMeter
from orchestrator.train.groups import Ranks
from orchestrator.train.precision.loss_scale import LossScale

Loss = Callable[[nn.Module, Any, Tier], LossTerms]


@dataclass(slots=True)
class Sums:
    """What the micro-batches of a step left: the loss of each on the device, summed over elements, how many elements
    that were, seconds of data, and by what the gradients were corrected in the end.
    """

    losses: list[Tensor] = field(default_factory=list)
    num_elements: int = 0
    data_s: float = 0.0
    correction: float = 1.0


class Gradients:
    """Computes the gradients of one trial on one rank.

    Attributes:
        loss_scale: of fp16.
        whole: why a micro-batch must not be cut, empty where it may.
    """

    def __init__(self, training: Training, model: nn.Module, ranks: Ranks, noise: NoiseMeter, loss: Loss) -> None:
        self._training, self._model, self._ranks, self._noise, self._loss = training, model, ranks, noise, loss
        self._params = list(model.parameters())  # the modules need not be walked in every step
        self.loss_scale = LossScale()
        self.whole = training.needs_whole_batches(model)

    def add(self, mine: Indices, num_samples: int, settings: Settings) -> Sums:
        """Add the gradients of this rank's samples of a step of `num_samples` over all ranks, unscaled."""
        sums = Sums()
        known = self._training.num_elements(num_samples)
        parts = self._noise.parts(mine, settings.micro_batch, may_cut=not self.whole)
        expected = 0
        for number, part in enumerate(parts, start=1):
            fsdp.set_gradient_sync(self._model, number == len(parts))
            began_s = time.monotonic()
            batch = self._training.batch(part.tolist(), self._ranks.device)
            sums.data_s += time.monotonic() - began_s
            self._ranks.pulse.beat("micro-batch")
            terms = self._loss(self._model, batch, settings.tier)
            if terms.is_mean:
                share = len(part) / num_samples
            elif known is not None:
                share = 1 / known
            else:  # ranks must agree without asking each other: samples count there
                expected = expected or max(
                    1, num_samples if self._ranks.world_size > 1 else terms.num_elements * len(parts)
                )
                share = 1 / expected
            # Sharded gradients are averaged over the ranks, so that the sum over all samples needs the rank count.
            self._backward(terms, settings.tier, self._ranks.world_size * share)
            loss_sum = terms.loss_sum.detach()
            sums.losses.append(loss_sum * len(part) if terms.is_mean else loss_sum)
            sums.num_elements += len(part) if terms.is_mean else terms.num_elements
            self._noise.after_part(number, self.loss_scale.factor(settings.tier))
        self.loss_scale.unscale(settings.tier, fsdp.local_grads(self._params))
        if expected:
            self._correct(sums, expected)
        return sums

    def add_mean(self, batch: Any, tier: Tier) -> float:  # noqa: ANN401 - the user's
        """Add the gradient of the mean loss of one batch of each rank, unscaled; returns that loss on this rank."""
        fsdp.set_gradient_sync(self._model, True)
        terms = self._loss(self._model, batch, tier)
        self._backward(terms, tier, 1 / max(1, terms.num_elements))
        self.loss_scale.unscale(tier, fsdp.local_grads(self._params))
        return float(terms.loss_sum.detach()) / max(1, terms.num_elements)

    def clip_and_norm(self) -> Tensor:
        """The norm of the whole gradient on the device, before it is clipped as the training declares."""
        return fsdp.clip_and_norm(self._params, self._training.clip_norm, self._training.clip_value)

    def _backward(self, terms: LossTerms, tier: Tier, weight: float) -> None:
        """Backward pass of `weight` times the loss; gradients add up, scaled where the tier is fp16.

        Where the loss is not finite every gradient becomes NaN: so all ranks learn of it from the norm of the whole
        gradient, and it cannot reach the weights through a gradient that happens to be finite.
        """
        loss_sum = terms.loss_sum
        factor = torch.where(loss_sum.detach().isfinite(), weight * self.loss_scale.factor(tier), float("nan"))
        (loss_sum * factor).backward()  # type: ignore[no-untyped-call]

    def _correct(self, sums: Sums, expected: int) -> None:
        """Divide by the elements that there were, of all ranks, and not by those expected."""
        total = sums.num_elements
        if self._ranks.world_size > 1:
            counted = torch.tensor([total], dtype=torch.int64)
            dist.all_reduce(counted, group=self._ranks.group)
            total = int(counted.item())
        sums.correction = expected / max(1, total)
        grads = [grad for grad in fsdp.local_grads(self._params) if grad.numel()]
        if sums.correction != 1.0 and grads:
            torch._foreach_mul_(grads, sums.correction)
            self._noise.rescale(sums.correction)
