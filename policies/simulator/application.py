"""What a simulated job trains: its range of batches, its length, its noise scale as it goes on, and its true speed.

Knows nothing of clusters or time. The engine asks it for speed and noise; policies see only what telemetry tells.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from orchestrator.policies.learn.efficiency import efficiency
from orchestrator.policies.simulator.response import Load, Response
from orchestrator.policies.tier import Tier


@dataclass(frozen=True, kw_only=True)
class NoiseCurve:
    """The gradient noise scale over a job's progress: constant on each of a few stretches.

    Attributes:
        ends: where each stretch ends, as ratios of the whole, ascending up to 1.
        scales: the noise scale on it in samples, > 0.
    """

    ends: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ends) != len(self.scales) or list(self.ends) != sorted(set(self.ends)) or self.ends[-1] != 1.0:
            raise ValueError(f"ends={self.ends}; allowed: ascending, one for each scale, the last one 1")
        if min(self.ends) <= 0 or min(self.scales) <= 0:
            raise ValueError(f"ends={self.ends}, scales={self.scales}; allowed: > 0")

    def index(self, ratio: float) -> int:
        """The stretch in which a progress ratio lies."""
        return min(bisect_right(self.ends, ratio), len(self.ends) - 1)

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """How long each stretch is."""
        return tuple(end - begin for begin, end in zip((0.0, *self.ends), self.ends, strict=False))


@dataclass(frozen=True, kw_only=True)
class Application:
    """One kind of job.

    Attributes:
        name: what workloads call it.
        base_batch: smallest global batch, in samples; efficiency is 1 there.
        max_batch: largest global batch.
        min_micro_batch, max_micro_batch: fewest samples of a rank that make sense, and most that fit a device.
        max_workers: most ranks that make sense.
        num_samples: samples to the end, at the base batch.
        noise: its noise scale.
        response: its true speed.
        requests: (workers, global batch) that its users ask for.
        tiers: tiers it may use, dearest first.
        min_share: smallest share of a device it may be given.
        counts_samples: whether it ends after so many samples whatever their batch, as trials of a live run do, and not
            after so much progress.
        memory_fixed_bytes, memory_sample_bytes: memory of one rank, and more of it per sample; 0 where not known.
    """

    name: str
    base_batch: int
    max_batch: int
    min_micro_batch: int
    max_micro_batch: int
    max_workers: int
    num_samples: float
    noise: NoiseCurve
    response: Response
    requests: tuple[tuple[int, int], ...]
    tiers: tuple[Tier, ...] = (Tier.FP32,)
    min_share: float = 1.0
    counts_samples: bool = False
    memory_fixed_bytes: int = 0
    memory_sample_bytes: int = 0

    def split(self, global_batch: int, num_workers: int) -> tuple[int, int]:
        """Micro-batch and accumulation of a global batch over so many workers, with as little accumulation as fits.

        As in the Pollux simulator the batch is rounded up to what divides.
        """
        per_rank = math.ceil(global_batch / num_workers)
        grad_accum = math.ceil(per_rank / self.max_micro_batch)
        return math.ceil(per_rank / grad_accum), grad_accum

    def efficiency(self, index: int, global_batch: int) -> float:
        """Progress per sample at a global batch on a stretch of the noise curve, relative to the base batch."""
        return 1.0 if self.counts_samples else efficiency(self.noise.scales[index], self.base_batch, global_batch)

    def alone_s(self, num_devices: float, devices_per_node: int, tier: Tier = Tier.FP32) -> float:
        """Seconds from beginning to end alone on so many devices, with the best batch at any time.

        A part of a device counts as that part of the time on a whole one.
        """
        workers = max(1, min(self.max_workers, int(num_devices)))
        slowness = max(1.0, 1.0 / num_devices)
        nodes = math.ceil(workers / devices_per_node)
        best = [math.inf] * len(self.noise.ends)
        for batch in self._batches(workers):
            micro_batch, grad_accum = self.split(batch, workers)
            load = Load(num_workers=workers, num_nodes=nodes, micro_batch=micro_batch, grad_accum=grad_accum, tier=tier)
            actual = micro_batch * grad_accum * workers
            sample_s = self.response.step_s(load) / actual
            for index in range(len(best)):
                best[index] = min(best[index], sample_s / self.efficiency(index, actual))
        widths = self.noise.widths
        return slowness * self.num_samples * sum(w * s for w, s in zip(widths, best, strict=True))

    def _batches(self, workers: int) -> list[int]:
        batches, batch = [], max(self.base_batch, workers)
        while batch < self.max_batch:
            batches.append(batch)
            batch = max(batch + 1, round(batch * 1.25))
        return [*batches, max(self.max_batch, workers)]


Applications = Mapping[str, Application]
