"""What a tier does to the gradient: the same samples in a reference tier and in others, without an optimizer step.

A probe takes two halves of a micro-batch. How far the reference's gradients of the halves lie apart is the sampling
noise; how far a tier's gradient lies from the reference's is its error, split into what both halves have in common (a
bias, which no batch averages away) and what they do not. Both are put in relation for the batch a step really takes:

    noise_ratio = (common * batch + own * half) / noise_per_sample

The products of both halves' errors and of both halves' gradients estimate, noisily, the power of that bias and of the
gradient without noise; the guard forms means of them.

Nothing is left behind: random state, gradients and buffers are as before, and the samples are not used up. With several
ranks each keeps sums over its own shards, and one small all-reduce adds them. Knows nothing of when to probe or what
follows (`watch`, `guard`).

Source: the noise terms as in McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.policies.tier import Tier
from orchestrator.train.fsdp import local_part
from orchestrator.train.precision.guard import Probe

HalfGradient = Callable[[Tier, int], float]
"""Leaves the mean gradient of half 0 or 1 of the probe's samples in `.grad`, not scaled; returns their mean loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSetup:
    """What a probe works on.

    Attributes:
        model: its gradients must be None.
        half_samples: samples of one half over all ranks.
        batch_samples: samples of a real step over all ranks.
        group: of all ranks for small tensors, None for one rank.
        device: of the model.
        seed: from which both halves draw the same dropout in every tier.
    """

    model: nn.Module
    half_samples: int
    batch_samples: int
    group: dist.ProcessGroup | None
    device: torch.device
    seed: int


def probe(
    setup: ProbeSetup, gradient: HalfGradient, reference: Tier, tiers: Sequence[Tier], times: Sequence[float] = ()
) -> tuple[dict[Tier, Probe], list[float]]:
    """Compare `tiers` with `reference`.

    Args:
        setup: the model and the batch.
        gradient: computes one half.
        reference: the tier to trust.
        tiers: the others.
        times: numbers of this rank to be averaged over the ranks by the way.

    Returns:
        What was found of each tier, the same on every rank; and the means of `times`.
    """
    with undisturbed(setup.model, setup.device):
        halves, loss = _halves(setup, gradient, reference)
        sums = [_dot(halves[0], halves[0]) + _dot(halves[1], halves[1]), _dot(halves[0], halves[1])]
        losses = [loss]
        for tier in tiers:
            errors, loss = _halves(setup, gradient, tier)
            lengths = _dot_sum(errors)
            for error, half in zip(errors, halves, strict=True):
                torch._foreach_sub_(error, half)
            sums += [lengths, _dot(errors[0], errors[1]), _dot(errors[0], errors[0]) + _dot(errors[1], errors[1])]
            losses.append(loss)
            del errors
    means = [*losses, *times]
    world_size = 1 if setup.group is None else dist.get_world_size(setup.group)
    local = torch.cat((torch.stack(sums).double().cpu(), torch.tensor(means, dtype=torch.float64) / world_size))
    if setup.group is not None:
        dist.all_reduce(local, group=setup.group)
    numbers = local.tolist()
    found = _judge(setup, numbers[: len(sums)], numbers[len(sums) : len(sums) + len(losses)])
    return dict(zip(tiers, found, strict=True)), numbers[len(sums) + len(losses) :]


def _judge(setup: ProbeSetup, sums: list[float], losses: list[float]) -> list[Probe]:
    squares, product = sums[0], sums[1]
    noise_per_sample = max(squares - 2 * product, 0.0) * setup.half_samples / 2
    length = max(squares + 2 * product, 0.0) ** 0.5
    found = []
    for number in range(len(losses) - 1):
        tier_length, common, squared = sums[2 + 3 * number : 5 + 3 * number]
        own = max(squared / 2 - common, 0.0)
        error = max(common, 0.0) * setup.batch_samples + own * setup.half_samples
        found.append(
            Probe(
                noise_ratio=error / noise_per_sample if noise_per_sample > 0 else float("inf") * error,
                norm_ratio=max(tier_length, 0.0) ** 0.5 / length if length > 0 else float("nan"),
                loss_gap=abs(losses[1 + number] - losses[0]) / max(abs(losses[0]), 1e-12),
                bias_sq=common,
                signal_sq=product,
            )
        )
    return found


def _halves(setup: ProbeSetup, gradient: HalfGradient, tier: Tier) -> tuple[tuple[list[Tensor], list[Tensor]], float]:
    """Both gradients in `tier` as far as this rank has them, taken out of the model, and the mean loss."""
    taken, losses = [], []
    for half in (0, 1):
        torch.manual_seed(setup.seed + half)
        losses.append(gradient(tier, half))
        taken.append(_take_gradients(setup.model))
    return (taken[0], taken[1]), sum(losses) / 2


def _take_gradients(model: nn.Module) -> list[Tensor]:
    gradients = []
    for param in model.parameters():
        if param.grad is not None:
            gradients.append(local_part(param.grad))
            param.grad = None
    return gradients


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum of products over all tensors."""
    parts = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True) if x.numel()]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _dot_sum(halves: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Square of the length of the sum of both halves."""
    first, second = halves
    return _dot(first, first) + 2 * _dot(first, second) + _dot(second, second)


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put random state and buffers (running means of batch norms) back afterwards; gradients are dropped."""
    model.zero_grad()  # of the step before, or the memory of a recorded one: nothing may be added to it
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            model.zero_grad()
