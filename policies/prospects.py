"""What every movable trial would make of every size it could be given: goodput, and the dials that reach it.

A size is a number of whole devices of one type, or a fraction of one. For each size the best global batch, split and
tier are found by evaluating a grid of them at once, for all trials of one shape together. Knows no capacity and no
objective. Called by the policies that place trials.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.fit import TrialFit, noise_scale, pool
from policies.fleet import Fleet
from policies.ladder import usable
from policies.movable import Mover, worker_range
from policies.plan import Settings
from policies.snapshot import DialLimits
from policies.throughput import Array, Throughput, prior, solve_throughput
from policies.tier import Tier

NUM_BATCHES = 12
MAX_POOLED = 32
"""Fits of one shape that are pooled at most, those with the most observations: more add time, not knowledge."""
_EVERY_COUNT_UP_TO = 8


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """What a trial may be given: whole devices of one type, or a fraction of one."""

    kind: int
    workers: int
    share: float

    @property
    def devices(self) -> float:
        """How much of the fleet it takes."""
        return self.workers * self.share


@dataclass(frozen=True, slots=True)
class Prospect:
    """One trial's goodput by size.

    Attributes:
        sizes: the sizes, the smallest first within each type.
        inside: samples/s of useful progress with all ranks on one node, 0 where a node is too small.
        across: the same with ranks on several nodes, 0 for one rank.
        is_prior: whether nobody ever ran its shape, so that only ratios mean something.
        spread: relative error of the model.
    """

    sizes: tuple[Size, ...]
    inside: tuple[float, ...]
    across: tuple[float, ...]
    is_prior: bool
    spread: float
    grid: _Grid
    row: int

    def goodput(self, index: int, *, spans_nodes: bool) -> float:
        """Goodput at a size."""
        return (self.across if spans_nodes else self.inside)[index]

    def dials(self, index: int, *, spans_nodes: bool) -> Settings:
        """The batch, split and tier that reach it."""
        return self.grid.settings(self.row, index, spans_nodes=spans_nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """How a policy wants prospects made.

    Attributes:
        fractions: shares of one device that may be given to one rank.
        tunes_batch: whether the batch may change; otherwise it is the one its user asked for.
        growth: ranks are limited to this many times the most that were measured.
        pools: whether that counts what other trials of the shape measured.
        counts: the numbers of ranks to consider, or None for all small and some large ones.
    """

    fractions: tuple[float, ...] = ()
    tunes_batch: bool = True
    growth: int = 2
    pools: bool = True
    counts: tuple[int, ...] | None = None


def models(movers: Iterable[Mover]) -> dict[str, Throughput]:
    """One model per shape, from what all its trials measured; unmeasured shapes are left out."""
    groups: dict[str, list[TrialFit]] = defaultdict(list)
    for mover in movers:
        if mover.trial.fit.cells:
            groups[mover.trial.shape].append(mover.trial.fit)
    found = {}
    for shape in sorted(groups):
        fits = heapq.nlargest(MAX_POOLED, groups[shape], key=lambda fit: (fit.num_observations, fit.cells[0].recent))
        model = solve_throughput(pool(fits).cells)
        if model.is_measured:
            found[shape] = model
    return found


def prospects(movers: Sequence[Mover], fleet: Fleet, ask: Ask) -> tuple[Prospect, ...]:
    """The prospects of every trial, in order."""
    solved = models(movers)
    counts = _counts(fleet, ask, movers)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, mover in enumerate(movers):
        groups[_group_key(mover, ask)].append(position)
    found: list[Prospect | None] = [None] * len(movers)
    for positions in groups.values():
        members = [movers[position] for position in positions]
        first = members[0]
        model, is_prior = _model(first, solved.get(first.trial.shape))
        sizes = _sizes(first, fleet, ask, model, counts)
        grid = _Grid(members, fleet, ask, model, sizes)
        for row, position in enumerate(positions):
            found[position] = Prospect(
                sizes,
                tuple(grid.inside[row].tolist()),
                tuple(grid.across[row].tolist()),
                is_prior,
                model.spread,
                grid,
                row,
            )
    return tuple(prospect for prospect in found if prospect is not None)


def _model(mover: Mover, model: Throughput | None) -> tuple[Throughput, bool]:
    """The model of a trial, and whether it is only a guess: nobody ran its shape, or none of the tiers it may use."""
    tiers = _usable(mover)
    if model is None:
        return prior(mover.trial.start.micro_batch, tiers), True
    if not set(tiers).isdisjoint(model.tiers()):
        return model, False
    other = model.tiers()[0]
    lines = {(tiers[0], name): line for (tier, name), line in model.lines.items() if tier == other}
    return dataclasses.replace(model, lines=lines), True


def _usable(mover: Mover) -> tuple[Tier, ...]:
    """The tiers it may use, without those it fled from or that its guard forbids if others are left."""
    trial = mover.trial
    found = usable(trial.limits.tiers, trial.fit.tiers, trial.fit.banned_tiers, mover.wish.tier)
    return found or trial.limits.tiers[:1]


def _group_key(mover: Mover, ask: Ask) -> tuple[object, ...]:
    """Trials of one key share sizes, grid and model."""
    trial = mover.trial
    batch = None if ask.tunes_batch else mover.wish.global_batch
    own = None if ask.pools else _most_workers(trial.fit)
    return (trial.shape, trial.start, trial.limits, trial.fit.banned_tiers, trial.fit.micro_batch_cap, batch, own)


def _most_workers(fit: TrialFit) -> int:
    return max((cell.num_workers for cell in fit.cells), default=0)


def _counts(fleet: Fleet, ask: Ask, movers: Iterable[Mover]) -> tuple[int, ...]:
    """Numbers of ranks worth considering: all small ones, then halves of octaves, and those of today."""
    if ask.counts is not None:
        return ask.counts
    most = max((fleet.capacity(kind) for kind in range(len(fleet.types))), default=0)
    counts = set(range(1, min(most, _EVERY_COUNT_UP_TO) + 1))
    step = _EVERY_COUNT_UP_TO
    while step <= most:
        counts |= {step, step + step // 2}
        step *= 2
    counts |= {len(mover.seats) for mover in movers} | {mover.wish.num_workers for mover in movers}
    return tuple(sorted(count for count in counts if 1 <= count <= most))


def _sizes(mover: Mover, fleet: Fleet, ask: Ask, model: Throughput, counts: Sequence[int]) -> tuple[Size, ...]:
    trial = mover.trial
    low, high = worker_range(trial)
    known = model.max_workers if ask.pools else _most_workers(trial.fit)
    high = max(low, min(high, max(1, ask.growth * known)))
    limits = trial.limits
    sizes = []
    for kind in range(len(fleet.types)):
        if low == 1:
            sizes += [Size(kind, 1, s) for s in ask.fractions if limits.min_share - 1e-9 <= s < limits.max_share]
        if limits.max_share >= 1:
            sizes += [Size(kind, n, 1.0) for n in counts if low <= n <= high and n <= fleet.capacity(kind)]
    return tuple(sorted(sizes))


class _Grid:
    """Goodput of the trials of one group over sizes and batches, and where its maxima are.

    Attributes:
        inside, across: best goodput, one row per trial and one column per size.
    """

    def __init__(
        self, members: Sequence[Mover], fleet: Fleet, ask: Ask, model: Throughput, sizes: Sequence[Size]
    ) -> None:
        trial = members[0].trial
        self._tiers = tuple(tier for tier in _usable(members[0]) if tier in model.tiers())
        workers = np.array([[size.workers] for size in sizes], dtype=np.float64).reshape(-1, 1)
        self._micro, self._accum = _batches(members[0], ask, workers, trial.limits)
        batch = self._micro * self._accum * workers
        noise = np.array([-1.0 if (n := noise_scale(m.trial.fit)) is None else n for m in members])
        self._efficiency = _efficiency(noise, float(trial.start.global_batch), batch)
        speeds = {device.device_type: device.speed for device in fleet.devices}
        slow = _slowness(sizes, fleet, model)
        self._rates: list[list[Array]] = []
        for spans in (False, True):
            rates = []
            for tier in self._tiers:
                rate = np.zeros_like(batch)
                for kind, name in enumerate(fleet.types):
                    rows = [i for i, size in enumerate(sizes) if size.kind == kind and _exists(size, fleet, spans)]
                    line = model.line(tier, name, speeds)
                    if not rows or line is None:
                        continue
                    step_s = model.step_s(line, self._micro[rows], self._accum[rows], workers[rows], spans_nodes=spans)
                    rate[rows] = batch[rows] / (step_s * slow[rows])
                rates.append(rate)
            self._rates.append(rates)
        self.inside, self._best_inside = self._best(0)
        self.across, self._best_across = self._best(1)

    def _best(self, spans: int) -> tuple[Array, list[npt.NDArray[np.int64]]]:
        """The best goodput per trial and size, and per trial and size the flat (tier, batch) index of it."""
        if not self._micro.size:
            return np.zeros((len(self._efficiency), 0)), [np.zeros(0, dtype=np.int64)] * len(self._efficiency)
        stacked = np.stack(self._rates[spans])  # tier, size, batch
        goodput = self._efficiency[:, None] * stacked[None]  # trial, tier, size, batch
        flat = goodput.transpose(0, 2, 1, 3).reshape(goodput.shape[0], goodput.shape[2], -1)
        where = flat.argmax(axis=2)
        best = np.take_along_axis(flat, where[:, :, None], axis=2)[:, :, 0]
        return best, list(where)

    def settings(self, row: int, index: int, *, spans_nodes: bool) -> Settings:
        """The dials of the best goodput of a trial at a size."""
        flat = int((self._best_across if spans_nodes else self._best_inside)[row][index])
        tier, column = divmod(flat, self._micro.shape[1])
        return Settings(
            share=1.0,
            micro_batch=int(self._micro[index, column]),
            grad_accum=int(self._accum[index, column]),
            tier=self._tiers[tier],
            num_workers=1,
        )


def _exists(size: Size, fleet: Fleet, spans: bool) -> bool:
    return size.workers > 1 if spans else size.workers <= fleet.node_sizes[size.kind]


def _slowness(sizes: Sequence[Size], fleet: Fleet, model: Throughput) -> Array:
    """Step time at a size over that at one core, and whatever its neighbours on the device cost it."""
    units = [next((d.units for d in fleet.devices if d.device_type == name), 1) for name in fleet.types]
    values = [
        (1 + model.interference * (1 - size.share)) / model.response(size.share * units[size.kind]) for size in sizes
    ]
    return np.array(values, dtype=np.float64).reshape(-1, 1)


def _batches(mover: Mover, ask: Ask, workers: Array, limits: DialLimits) -> tuple[Array, Array]:
    """Micro-batches and accumulations to weigh: one row per size, one column per global batch."""
    trial = mover.trial
    largest = min(limits.max_micro_batch, trial.fit.micro_batch_cap or limits.max_micro_batch)
    if ask.tunes_batch:
        low = np.maximum(limits.min_global_batch, limits.min_micro_batch * workers)
        high = np.maximum(low, limits.max_global_batch)
        wanted = low * (high / low) ** np.linspace(0.0, 1.0, NUM_BATCHES)[None, :]
        start = np.clip(float(trial.start.global_batch), low, high)
        wanted = np.concatenate([wanted, start], axis=1)
    else:
        wanted = np.full_like(workers, float(mover.wish.global_batch))
    per_rank = np.maximum(1.0, np.ceil(wanted / workers - 1e-9))
    accum = np.ceil(per_rank / largest)
    micro = np.ceil(per_rank / accum)
    over = (micro * accum * workers > limits.max_global_batch) & (micro > 1)
    fewer = (micro - 1) * accum * workers
    micro = np.where(over & (fewer >= limits.min_global_batch), micro - 1, micro)
    return micro, accum


def _efficiency(noise: Array, base: float, batch: Array) -> Array:
    """Statistical efficiency, one row per trial; see `policies.goodput.efficiency` (noise below 0: not known)."""
    known = noise[:, None, None]
    unknown = np.minimum(1.0, base / batch)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        value: Array = np.where(known < 0, unknown, (known + base) / (known + batch[None]))
    return value


def reference(prospect: Prospect) -> float:
    """Goodput on one whole device, the best type of them; what speed-ups are counted in. Always above 0."""
    ones = [prospect.inside[i] for i, size in enumerate(prospect.sizes) if size.workers == 1 and size.share == 1]
    if ones and max(ones) > 0:
        return max(ones)
    # No single device is allowed: scale the smallest size down as if it were linear.
    best = [
        max(prospect.inside[i], prospect.across[i]) / size.devices
        for i, size in enumerate(prospect.sizes)
        if max(prospect.inside[i], prospect.across[i]) > 0
    ]
    return max(best, default=1.0)


def with_share(settings: Settings, size: Size) -> Settings:
    """The dials at a size."""
    return dataclasses.replace(settings, share=size.share, num_workers=size.workers)


def goodput_now(mover: Mover, prospect: Prospect, fleet: Fleet) -> float | None:
    """Predicted goodput of what it has, with the best dials; None where it holds nothing or that is no size."""
    if not mover.seats:
        return None
    size = Size(fleet.type_of[mover.seats[0]], len(mover.seats), mover.share)
    if size not in prospect.sizes:
        return None
    spans = fleet.num_nodes(mover.seats) > 1
    value = prospect.goodput(prospect.sizes.index(size), spans_nodes=spans)
    return value if value > 0 and math.isfinite(value) else None


def tiers_of(model: Throughput | None, limits: DialLimits) -> Mapping[Tier, bool]:
    """Which allowed tiers were measured."""
    known = () if model is None else model.tiers()
    return {tier: tier in known for tier in limits.tiers}
