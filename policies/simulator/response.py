"""How fast a job really trains in a simulated world: seconds per step for a given load of devices.

A response is what a policy tries to learn. `Parametric` has the form of the literature, `Measured` is a table. Neither
knows time, noise or plans. Called by the engine only: a policy never sees a response.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.policies.tier import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one job runs on and with, as far as its speed depends on it.

    Attributes:
        num_workers, num_nodes: ranks, and the nodes they are spread over.
        micro_batch, grad_accum, tier: the dials.
        share: share of each of its devices.
        crowd_share: shares that others hold on its fullest device, summed.
        device_type: the type of its devices, the slowest if there are several.
    """

    num_workers: int
    num_nodes: int
    micro_batch: int
    grad_accum: int
    tier: Tier
    share: float = 1.0
    crowd_share: float = 0.0
    device_type: str = ""


class Response(Protocol):
    """The true speed of one application."""

    def step_s(self, load: Load) -> float:
        """Seconds per optimizer step, > 0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How fast a job computes on a part of a device, relative to a whole one that it has for itself.

    Attributes:
        points: (share, relative speed), both ascending and > 0, ending with (1, 1). Between them speed is a power of
            the share, below the first one it is proportional to it.
        crowding: speed lost where others fill the rest of the device, as a ratio; in proportion to what they fill.
    """

    points: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    crowding: float = 0.0

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        if shares != sorted(set(shares)) or min(min(point) for point in self.points) <= 0 or shares[-1] != 1.0:
            raise ValueError(f"points={self.points}; allowed: ascending shares and speeds > 0, ending with share 1")
        if not 0 <= self.crowding < 1:
            raise ValueError(f"crowding={self.crowding}; allowed: 0 to 1, 1 excluded")

    def speed(self, share: float, crowd_share: float = 0.0) -> float:
        """Relative speed at a share in (0, 1].

        >>> Sharing(points=((0.25, 0.5), (1.0, 1.0))).speed(0.5)
        0.7071067811865476
        """
        return _power_between(self.points, share) * (1 - self.crowding * min(1.0, crowd_share))


WHOLE = Sharing()
"""Speed in proportion to the share: what one knows of a job whose sharing nobody measured."""


def _power_between(points: Sequence[tuple[float, float]], x: float) -> float:
    index = bisect_left(points, (x,))
    if index == 0:
        return points[0][1] * x / points[0][0]
    if index == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    exponent = math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * math.pow(x / x0, exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parametric:
    """Step time in the form of Pollux: compute, and a synchronisation that overlaps with it.

        compute_s = (alpha_c + beta_c * micro_batch) / (sharing * tier * device)
        sync_s    = 0 for one worker, else alpha + beta * max(0, workers - 2), on one node (r) or several (n)
        step_s    = (grad_accum - 1) * compute_s + (compute_s ** gamma + sync_s ** gamma) ** (1 / gamma)

    Attributes:
        alpha_c, beta_c: seconds of a micro-batch, fixed and per sample.
        alpha_r, beta_r: seconds of synchronising within a node, and more of it per rank beyond two.
        alpha_n, beta_n: the same over several nodes.
        gamma: overlap of compute and synchronisation, 1 (none) to 10 (nearly full).
        sharing: speed on a part of a device.
        tiers: speed of compute in a tier relative to fp32; 1 where a tier is not named.
        devices: speed of compute on a device type relative to the one of the alphas; 1 where a type is not named.

    Source: Pollux (OSDI 2021), section 3.2, equations 8 to 11.
    """

    alpha_c: float
    beta_c: float
    alpha_r: float = 0.0
    beta_r: float = 0.0
    alpha_n: float = 0.0
    beta_n: float = 0.0
    gamma: float = 1.0
    sharing: Sharing = WHOLE
    tiers: Mapping[Tier, float] = field(default_factory=dict)
    devices: Mapping[str, float] = field(default_factory=dict)

    def step_s(self, load: Load) -> float:
        """Seconds per optimizer step.

        >>> model = Parametric(alpha_c=0.02, beta_c=0.001, alpha_r=0.03, gamma=2.0)
        >>> one = Load(num_workers=1, num_nodes=1, micro_batch=20, grad_accum=1, tier=Tier.FP32)
        >>> model.step_s(one)
        0.04
        """
        speed = self.sharing.speed(load.share, load.crowd_share)
        speed *= self.tiers.get(load.tier, 1.0) * self.devices.get(load.device_type, 1.0)
        compute_s = (self.alpha_c + self.beta_c * load.micro_batch) / speed
        sync_s = self._sync_s(load)
        last_s = (compute_s**self.gamma + sync_s**self.gamma) ** (1 / self.gamma) if sync_s else compute_s
        return (load.grad_accum - 1) * compute_s + last_s

    def _sync_s(self, load: Load) -> float:
        if load.num_workers == 1:
            return 0.0
        alpha, beta = (self.alpha_n, self.beta_n) if load.num_nodes > 1 else (self.alpha_r, self.beta_r)
        return alpha + beta * (load.num_workers - 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Step time from a table of placements and local batches.

    Attributes:
        cells: (nodes, workers) -> (micro-batch, seconds per step, seconds of it that only synchronise), by micro-batch.
            Between micro-batches, and beyond them, time is a line; a placement that was not measured is the mean of the
            nearest ones that were, weighted by how near they are.
        sharing, tiers, devices: as in `Parametric`; they change the computing part of a step.
    """

    cells: Mapping[tuple[int, int], tuple[tuple[int, float, float], ...]]
    sharing: Sharing = WHOLE
    tiers: Mapping[Tier, float] = field(default_factory=dict)
    devices: Mapping[str, float] = field(default_factory=dict)

    def step_s(self, load: Load) -> float:
        """Seconds per optimizer step."""
        total_s, sync_s = self._times(load.num_nodes, load.num_workers, load.micro_batch)
        speed = self.sharing.speed(load.share, load.crowd_share)
        speed *= self.tiers.get(load.tier, 1.0) * self.devices.get(load.device_type, 1.0)
        return load.grad_accum * (total_s - sync_s) / speed + sync_s

    def _times(self, num_nodes: int, num_workers: int, micro_batch: int) -> tuple[float, float]:
        exact = self.cells.get((num_nodes, num_workers))
        if exact is not None:
            return _on_line(exact, micro_batch)
        near = sorted((_distance(key, (num_nodes, num_workers)), key) for key in self.cells)[:3]
        weights = [1 / distance for distance, _ in near]
        times = [_on_line(self.cells[key], micro_batch) for _, key in near]
        total = sum(weights)
        return (
            sum(w * t[0] for w, t in zip(weights, times, strict=True)) / total,
            sum(w * t[1] for w, t in zip(weights, times, strict=True)) / total,
        )


def _distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How far two placements are apart, in octaves; one node is far from several."""
    octaves = math.hypot(math.log2(one[0] / other[0]), math.log2(one[1] / other[1]))
    return octaves + (4.0 if (one[0] == 1) != (other[0] == 1) else 0.0)


def _on_line(cells: Sequence[tuple[int, float, float]], micro_batch: int) -> tuple[float, float]:
    """Step and synchronisation seconds at a micro-batch; the latter never more than nine tenths of the former."""
    if len(cells) == 1:
        size, total_s, sync_s = cells[0]
        ratio = micro_batch / size
        return total_s * ratio, min(sync_s, 0.9 * total_s * ratio)
    index = min(max(bisect_left(cells, (micro_batch,)), 1), len(cells) - 1)
    (m0, t0, s0), (m1, t1, s1) = cells[index - 1], cells[index]
    part = (micro_batch - m0) / (m1 - m0)
    total_s = max(t0 + part * (t1 - t0), 0.2 * min(t0, t1))
    return total_s, min(max(0.0, s0 + part * (s1 - s0)), 0.9 * total_s)
