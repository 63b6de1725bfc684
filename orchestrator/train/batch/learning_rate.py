"""The learning rate as a pure function of the samples seen, of the global batch and of the noise scale.

A schedule that counts samples means the same at every batch size. Knows no policy and no model; the loop keeps one
`LearningRate`, asks it `at(samples, noise_scale)` before each step and stores its `state()` in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import torch

from orchestrator.policies.learn.efficiency import gain


class ScalingRule(StrEnum):
    """How the learning rate follows the global batch.

    SQRT is for Adam and its kin (Malladi et al. 2022, arXiv 2205.10287, "square root scaling rule"), up to the noise
    scale and not beyond it, where the best rate of Adam no longer grows (Li et al. 2024, arXiv 2405.14578). ADASCALE is
    for SGD: the rate grows by the gain of the larger batch (Johnson et al. 2020, arXiv 2007.05105), which is that of
    LINEAR (Goyal et al. 2017, arXiv 1706.02677) while noise prevails and less near the noise scale. NONE leaves it.
    """

    NONE = "none"
    SQRT = "sqrt"
    LINEAR = "linear"
    ADASCALE = "adascale"


class Shape(StrEnum):
    """What the schedule does after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"


def scaled(
    base_lr: float, rule: ScalingRule | str, base_batch: int, global_batch: int, noise_scale: float | None = None
) -> float:
    """The learning rate at `global_batch` that corresponds to `base_lr` at `base_batch`.

    Raises:
        ValueError: a batch below 1, or a rule that is none of `ScalingRule`.
    """
    return base_lr * _batch_factor(rule, base_batch, global_batch, noise_scale)


def _batch_factor(rule: ScalingRule | str, base_batch: int, global_batch: int, noise_scale: float | None) -> float:
    """What `rule` multiplies the learning rate by; an unknown noise scale counts as one above both batches."""
    if base_batch < 1 or global_batch < 1:
        raise ValueError(f"base_batch={base_batch}, global_batch={global_batch} cannot be scaled; allowed: both >= 1")
    ratio = global_batch / base_batch
    match rule:
        case ScalingRule.NONE:
            return 1.0
        case ScalingRule.SQRT:
            limit = math.inf if noise_scale is None else noise_scale
            return math.sqrt(min(global_batch, limit) / min(base_batch, limit))
        case ScalingRule.LINEAR:
            return ratio
        case ScalingRule.ADASCALE:
            return ratio if noise_scale is None else gain(noise_scale, base_batch, global_batch)
    allowed = ", ".join(ScalingRule)
    raise ValueError(f"rule={rule!r} is unknown; allowed: {allowed}; 'sqrt' suits Adam, 'adascale' suits SGD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What does not change while a trial runs.

    Attributes:
        base_lr: learning rate after the warm-up at `base_batch`.
        base_batch: global batch that `base_lr` was chosen for.
        rule: how it follows the global batch.
        shape: constant or cosine after the warm-up.
        total_samples: samples of the whole trial, where a cosine ends.
        warmup_samples: samples of linear warm-up from zero.
        ramp_samples: samples over which a *larger* batch brings in its larger rate; a smaller one acts at once,
            because a rate too large for the batch is what diverges.
        final_ratio: what a cosine ends at, as a fraction of the peak.
    """

    base_lr: float
    base_batch: int
    rule: ScalingRule
    shape: Shape
    total_samples: int
    warmup_samples: int = 0
    ramp_samples: int = 0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no trial can follow."""
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise ValueError(f"base_lr={self.base_lr} cannot train; allowed: a finite number > 0")
        if self.total_samples < 1 or self.base_batch < 1:
            raise ValueError(f"total_samples={self.total_samples}, base_batch={self.base_batch}; allowed: both >= 1")
        if not 0 <= self.warmup_samples <= self.total_samples or self.ramp_samples < 0:
            raise ValueError(
                f"warmup_samples={self.warmup_samples}, ramp_samples={self.ramp_samples}; "
                f"allowed: 0 <= warmup_samples <= total_samples={self.total_samples} and ramp_samples >= 0"
            )
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio={self.final_ratio}; allowed: 0 to 1")

    def at(self, samples: int) -> float:
        """The learning rate after `samples` samples at the base batch, > 0 from the first sample on but for a cosine's
        end at `final_ratio` 0.
        """
        if samples < self.warmup_samples:
            # The step at sample 0 would otherwise train with a rate of exactly zero.
            return self.base_lr * max(samples, 1) / self.warmup_samples
        if self.shape is Shape.CONSTANT:
            return self.base_lr
        span = max(self.total_samples - self.warmup_samples, 1)
        done = min((samples - self.warmup_samples) / span, 1.0)
        return self.base_lr * (self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """A schedule, and the one change of batch that may still be coming into effect.

    Attributes:
        schedule: what does not change.
        global_batch: the batch in force.
        ramp_from: batch factor in force when that batch came.
        ramp_start: samples seen at that moment.
    """

    schedule: Schedule
    global_batch: int
    ramp_from: float
    ramp_start: int

    @classmethod
    def start(cls, schedule: Schedule, global_batch: int) -> Self:
        """At sample 0 with `global_batch`, without a ramp."""
        factor = _batch_factor(schedule.rule, schedule.base_batch, global_batch, None)
        return cls(schedule=schedule, global_batch=global_batch, ramp_from=factor, ramp_start=0)

    @classmethod
    def restored(cls, schedule: Schedule, state: Mapping[str, float]) -> Self:
        """What `state()` described, under `schedule`."""
        return cls(
            schedule=schedule,
            global_batch=int(state["global_batch"]),
            ramp_from=float(state["ramp_from"]),
            ramp_start=int(state["ramp_start"]),
        )

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep, fit for JSON without loss."""
        return {"global_batch": self.global_batch, "ramp_from": self.ramp_from, "ramp_start": self.ramp_start}

    def factor(self, samples: int, noise_scale: float | None = None) -> float:
        """What the batch in force multiplies the schedule by after `samples` samples."""
        target = _batch_factor(self.schedule.rule, self.schedule.base_batch, self.global_batch, noise_scale)
        passed = samples - self.ramp_start
        if target <= self.ramp_from or passed >= self.schedule.ramp_samples:
            return target
        return self.ramp_from + (target - self.ramp_from) * max(passed, 0) / self.schedule.ramp_samples

    def at(self, samples: int, noise_scale: float | None = None) -> float:
        """The learning rate of the step that starts after `samples` samples."""
        return self.schedule.at(samples) * self.factor(samples, noise_scale)

    def is_ramping(self, samples: int, noise_scale: float | None = None) -> bool:
        """Whether the last change of batch is still coming into effect."""
        target = _batch_factor(self.schedule.rule, self.schedule.base_batch, self.global_batch, noise_scale)
        return self.factor(samples, noise_scale) != target

    def with_batch(self, global_batch: int, samples: int, noise_scale: float | None = None) -> Self:
        """After a change to `global_batch` at `samples`; the same object where the batch is unchanged.

        A change that comes while another is still coming in takes its place, from the factor reached so far: at most
        one is ever pending, and the learning rate never jumps upwards.
        """
        if global_batch == self.global_batch:
            return self
        return replace(self, global_batch=global_batch, ramp_from=self.factor(samples, noise_scale), ramp_start=samples)


def apply(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set `lr` in every parameter group. A tensor is filled in place, so that a captured graph sees it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
