"""One trial's model and optimizer, and how one optimizer step of it is done.

Knows nothing of boundaries or telemetry: `loop` turns the dials here between two steps and reads what a step did.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from jobs import job_info
from jobs.data import SampleCursor, micro_batches, rank_slice
from jobs.job import Job
from orchestrator.control.orders import TrialOrder
from orchestrator.train import checkpoint, fsdp
from orchestrator.train.batch.learning_rate import LearningRate, ScalingRule, Schedule, Shape, apply
from orchestrator.train.batch.noise import NoiseEstimate, NoiseEstimator
from orchestrator.train.precision.tiers import install, set_tier
from policies.plan import Settings
from policies.tier import Tier

MAX_GRAD_NORM = 1.0
NOISE_PERIOD_STEPS = 8
"""Two of so many steps keep their gradients for the noise scale: enough estimates in seconds, at a few per cent of a
small step and nothing of a large one."""

WARMUP_STEPS = 20
RAMP_STEPS = 50
"""Steps at the start batch over which a larger batch brings in its larger learning rate (50-100 in practice)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Where a process stands in its worker group. `group` is the side group for small agreements."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did. `is_skipped` means that a gradient was not finite and nothing was changed."""

    is_skipped: bool
    num_samples: int
    loss: float
    grad_norm: float
    learning_rate: float
    noise: NoiseEstimate | None
    data_s: float


class Stepper:
    """Trains one trial, one step at a time. Every rank of the worker group has one."""

    def __init__(self, order: TrialOrder, job: Job, ranks: Ranks) -> None:
        self.job, self._ranks, self._order = job, ranks, order
        with ranks.device:
            self.model = job.build_model()
        install(self.model)
        fsdp.shard(self.model, job.blocks(self.model), ranks.mesh)
        self.optimizer = job.build_optimizer(self.model)
        self.cursor = SampleCursor(seed=order.seed, num_samples=job.num_train_samples)
        self.step_index = 0
        self.settings = order.start
        self._noise = NoiseEstimator(every=NOISE_PERIOD_STEPS)
        self._rate = LearningRate.start(self._schedule(), order.start.global_batch)
        set_tier(self.model, order.start.tier)
        # Every rank built the same model from the same seed; what it draws from here on (dropout) is its own.
        torch.manual_seed(order.seed + ranks.rank)

    def turn(self, settings: Settings) -> None:
        """Apply batch and tier; share belongs to the process, world size to the worker group."""
        if settings.tier is not self.settings.tier:
            set_tier(self.model, settings.tier)
        if (settings.global_batch, settings.tier) != (self.settings.global_batch, self.settings.tier):
            self._noise.reset()
            self._rate = self._rate.with_batch(settings.global_batch, self.cursor.position)
        self.settings = settings

    def step(self) -> StepResult:
        """One optimizer step of `settings.global_batch` samples; on a non-finite gradient nothing changes."""
        settings = self.settings
        indices, cursor = self.cursor.take(settings.global_batch)
        total_elements = self.job.num_elements(len(indices))
        mine = rank_slice(indices, self._ranks.rank, self._ranks.world_size)
        loss_sum, num_elements, data_s = 0.0, 0, 0.0
        parts = micro_batches(mine, settings.micro_batch)
        for number, part in enumerate(parts, start=1):
            fsdp.set_gradient_sync(self.model, number == len(parts))
            began_s = time.monotonic()
            batch = self.job.batch(part.tolist(), self._ranks.device)
            data_s += time.monotonic() - began_s
            terms = self.job.loss(self.model, batch)
            # Sharded gradients are averaged over the ranks, so that the sum over all samples needs the rank count.
            (terms.loss_sum * (self._ranks.world_size / total_elements)).backward()  # type: ignore[no-untyped-call]
            loss_sum += float(terms.loss_sum.detach())
            num_elements += terms.num_elements
        noise = self._estimate_noise(settings)
        grad_norm = float(fsdp.clip_and_norm(self.model, MAX_GRAD_NORM))
        is_skipped = not math.isfinite(grad_norm)
        rate = self._rate.at(self.cursor.position)
        if not is_skipped:
            apply(self.optimizer, rate)
            self.optimizer.step()
            self.cursor = cursor
            self.step_index += 1
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            is_skipped=is_skipped,
            num_samples=0 if is_skipped else len(indices),
            loss=loss_sum / max(1, num_elements),
            grad_norm=grad_norm,
            learning_rate=rate,
            noise=None if is_skipped else noise,
            data_s=data_s,
        )

    def evaluate(self) -> dict[str, float]:
        """Validation metrics, in the tier the trial runs with."""
        self.model.eval()
        try:
            return self.job.evaluate(self.model, self._ranks.device)
        finally:
            self.model.train()

    def commit(self, directory: Path, extra: dict[str, Any]) -> Path:
        """Write a checkpoint that `resume` can continue from; returns when it is durable on all ranks."""
        return checkpoint.commit(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            extra={**extra, "step": self.step_index, "position": self.cursor.position, "rate": self._rate.state()},
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            group=self._ranks.group,
        )

    def resume(self, path: Path) -> dict[str, Any]:
        """Continue from a commit; returns the `extra` it was written with."""
        extra = checkpoint.load(
            path,
            model=self.model,
            optimizer=self.optimizer,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            group=self._ranks.group,
        )
        self.cursor = replace(self.cursor, position=int(extra["position"]))
        self.step_index = int(extra["step"])
        self._rate = LearningRate.restored(self._rate.schedule, extra["rate"])
        self._noise.reset()
        return extra

    def _schedule(self) -> Schedule:
        """Constant after a short warm-up; a larger batch brings its larger rate in over some steps of its own."""
        order = self._order
        total = order.samples_per_report * order.max_reports
        return Schedule(
            base_lr=float(self.optimizer.param_groups[0]["lr"]),
            base_batch=order.start.global_batch,
            rule=ScalingRule(job_info(order.job).learning_rate_rule),
            shape=Shape.CONSTANT,
            total_samples=total,
            warmup_samples=min(WARMUP_STEPS * order.start.global_batch, total // 20),
            ramp_samples=RAMP_STEPS * order.start.global_batch,
        )

    def _estimate_noise(self, settings: Settings) -> NoiseEstimate | None:
        if not self._noise.wants(self.step_index):
            return None
        return self._noise.observe(fsdp.local_grads(self.model), settings.global_batch, self._ranks.group)


def dearer_tier(tier: Tier, allowed: tuple[Tier, ...]) -> Tier | None:
    """The next dearer tier that is allowed, None at the top. `allowed` is ordered dearest first."""
    index = allowed.index(tier) if tier in allowed else 0
    return allowed[index - 1] if index > 0 else None
