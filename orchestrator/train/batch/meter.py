"""The noise scale of a trial while it trains: the estimator that suits its ranks, and the mean of what it finds.

The stepper asks `begin` before a step, takes its micro-batches from `parts` and says `after_part` behind each of them,
and `end` after the backward pass. The mean is the same on every rank, is kept in checkpoints, and drives the learning
rate; policies form their own from the telemetry of single draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.jobs.data import Indices, micro_batches
from orchestrator.policies.learn.fit import MIN_NOISE_ESTIMATES
from orchestrator.policies.learn.noise import noise_ratio
from orchestrator.train import fsdp
from orchestrator.train.batch.noise import HalfNoise, NoiseEstimate, weights_of
from orchestrator.train.batch.rank_noise import RankNoise

FIRST_STEP = 20
"""Nothing is measured before: the gradients of an untrained model point the same way, which says nothing of later."""
EARLY_PERIOD_STEPS = 4
"""Two of so many steps (one on several ranks) are measured at first, so that the noise scale is known early; never two
in a row, because the memory of a step shows only in one that is not cut."""
EARLY_DRAWS = 2 * MIN_NOISE_ESTIMATES
PERIOD_STEPS = 32
"""The same after that, until there are `ENOUGH_DRAWS`."""
ENOUGH_DRAWS = 60
QUIET_PERIOD_STEPS = 64
"""The same from then on: a small model's step takes clearly longer where it is cut and measured."""
REPLAYED_EARLY_PERIOD_STEPS, REPLAYED_PERIOD_STEPS = 16, 64
"""The same for steps that are replayed, which are short: at first and later."""
HORIZON = 100
"""Draws that the mean looks back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseMean:
    """Both terms averaged apart over the last draws."""

    noise_trace: float = 0.0
    grad_sq: float = 0.0
    count: int = 0

    def add(self, draw: NoiseEstimate) -> Self:
        """With one more draw."""
        gain = 1.0 / (min(self.count, HORIZON - 1) + 1)
        return type(self)(
            noise_trace=self.noise_trace + gain * (draw.noise_trace - self.noise_trace),
            grad_sq=self.grad_sq + gain * (draw.grad_sq - self.grad_sq),
            count=self.count + 1,
        )

    @property
    def scale(self) -> float | None:
        """The noise scale in samples; None before enough draws."""
        return None if self.count < MIN_NOISE_ESTIMATES else noise_ratio(self.noise_trace, self.grad_sq)


class PairPart(StrEnum):
    """What a replayed step does for the noise scale: keep its gradients, or compare them with those kept."""

    HOLD = "hold"
    COMPARE = "compare"


class NoiseMeter:
    """Measures the noise scale of one trial on one rank."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world_size: int) -> None:
        self._params, self._optimizer = list(model.parameters()), optimizer
        self._halves = HalfNoise() if world_size == 1 else None
        self._is_due = False
        self._half = self._num_first = 0
        self._held_step: int | None = None
        self._ranks = RankNoise(model, every=PERIOD_STEPS) if world_size > 1 else None
        self.mean = NoiseMean()

    @property
    def scale(self) -> float | None:
        """The noise scale in samples; None before enough draws."""
        return self.mean.scale

    def reset(self) -> None:
        """Forget a half-done measurement: after a change of batch or tier, or a resume."""
        self._held_step = None
        for estimator in (self._halves, self._ranks):
            if estimator is not None:
                estimator.reset()

    def exchange_in(self, dtype: torch.dtype | None) -> None:
        """In which dtype ranks exchange gradients, which is done where they are measured; one rank exchanges none."""
        if self._ranks is not None:
            self._ranks.exchange_in(dtype)

    def begin(self, step: int) -> bool:
        """Called before an eager step; whether `end` is to be called after its backward pass."""
        self._is_due, self._held_step = False, None
        if step < FIRST_STEP:
            return False
        if self._halves is not None:
            self._halves.reset()
            self._is_due = step % (self._period // 2) == 0
            return self._is_due
        assert self._ranks is not None
        is_due = step % self._period == 0
        if is_due:
            self._ranks.arm(is_elementwise="betas" in self._optimizer.param_groups[0])
        return is_due

    def begin_replayed(self, step: int) -> PairPart | None:
        """Called before a replayed step, which cannot be cut: its part in a pair of steps, None for most."""
        held_step, self._held_step = self._held_step, None
        phase = step % (REPLAYED_EARLY_PERIOD_STEPS if self._is_early else REPLAYED_PERIOD_STEPS)
        if step < FIRST_STEP or phase > 1:
            return None
        if phase == 0:
            self._held_step = step
            return PairPart.HOLD
        return PairPart.COMPARE if held_step == step - 1 else None

    def pairs_ahead(self, step: int, num_steps: int) -> dict[int, PairPart]:
        """What those of the next steps that do anything for it do, counted from `step` on, by the same rule."""
        period = REPLAYED_EARLY_PERIOD_STEPS if self._is_early else REPLAYED_PERIOD_STEPS
        near = range(num_steps) if period >= num_steps else (i for i in range(num_steps) if (step + i) % period <= 1)
        parts = ((index, self.begin_replayed(step + index)) for index in near)
        return {index: part for index, part in parts if part is not None}

    def parts(self, mine: Indices, micro_batch: int, *, may_cut: bool = True) -> list[Indices]:
        """The micro-batches of a step on this rank; two at least where its halves are to be compared.

        A single micro-batch is cut in two for that if it may be; otherwise nothing is measured.
        """
        is_halved = self._is_due and self._halves is not None
        is_cut = is_halved and may_cut
        found = micro_batches(mine, min(micro_batch, max(1, (len(mine) + 1) // 2)) if is_cut else micro_batch)
        self._half = len(found) // 2 if is_halved else 0
        self._num_first = sum(len(part) for part in found[: self._half])
        return found

    def after_part(self, number: int, loss_scale: float) -> None:
        """The gradients hold what the first `number` micro-batches have added, still multiplied by the scale."""
        if number == self._half and self._halves is not None:
            self._halves.hold(fsdp.local_grads(self._params), self._num_first, grad_scale=loss_scale)

    def rescale(self, factor: float) -> None:
        """The gradients of the step were multiplied by that, behind its last part."""
        if self._halves is not None:
            self._halves.rescale(factor)

    def end(
        self, counts: Sequence[int], group: dist.ProcessGroup | None, *, loss_scale: float = 1.0
    ) -> NoiseEstimate | None:
        """Take the gradients of the step, reduced, unscaled and unclipped; `counts` holds the samples of each rank.

        `loss_scale` is what the loss was multiplied with: what the ranks brought to the reduction was still scaled.
        """
        grads = fsdp.local_grads(self._params)
        weights = weights_of(self._optimizer, self._params)
        if weights is None:
            self.reset()
            return None
        if self._halves is not None:
            return self._halves.observe(grads, sum(counts), weights=weights)
        assert self._ranks is not None
        return self._ranks.observe(grads, counts, group, squares_scale=loss_scale, weights=weights)

    def keep(self, draw: NoiseEstimate | None) -> None:
        """Put a draw into the mean, once its step was not skipped."""
        if draw is not None:
            self.mean = self.mean.add(draw)

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep, fit for JSON without loss."""
        return {"noise_trace": self.mean.noise_trace, "grad_sq": self.mean.grad_sq, "count": self.mean.count}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up what `state()` described."""
        self.reset()
        self.mean = NoiseMean(
            noise_trace=float(state["noise_trace"]), grad_sq=float(state["grad_sq"]), count=int(state["count"])
        )

    @property
    def _is_early(self) -> bool:
        return self.mean.count < EARLY_DRAWS

    @property
    def _period(self) -> int:
        if self._is_early:
            return EARLY_PERIOD_STEPS
        return PERIOD_STEPS if self.mean.count < ENOUGH_DRAWS else QUIET_PERIOD_STEPS
