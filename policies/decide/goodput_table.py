"""The predicted goodput of every trial that may be placed, for every size it may get, and the dials that reach it.

A size is a number of whole devices of one type, or a fraction of one. For each size the best global batch, split and
tier are found by evaluating a grid of them, for all trials of one shape together. Capacity and objective are left to
the callers, the policies that place trials.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.policies.decide.candidates import Candidate
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.sizes import SearchSpace, Size, counts_of, most_workers, sizes_of
from orchestrator.policies.learn.fit import TrialFit, noise_scale, pool
from orchestrator.policies.learn.scaling import Array, ScalingModel, prior, solve_scaling
from orchestrator.policies.learn.tier_fit import usable
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import TrialView
from orchestrator.policies.tier import Tier

HELD_PART = 0.9
"""Part of the least efficiency that is enough to keep a batch."""
NUM_BATCHES = 12
MAX_POOLED = 32
"""Fits of one shape that are pooled at most, those with the most observations: more add time, not knowledge."""
_NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class GoodputTable:
    """One trial's goodput by size.

    Attributes:
        sizes: the sizes, the smallest first within each type.
        inside: samples/s of useful progress with all ranks on one node, 0 where a node is too small.
        across: the same with ranks on several nodes, 0 for one rank.
        is_prior: whether its shape was never measured, so that only ratios of its goodputs mean something.
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

    def best(self, index: int) -> float:
        """Goodput at a size inside one node, or across several where none is large enough."""
        return self.inside[index] or self.across[index]

    @property
    def measured_tiers(self) -> tuple[Tier, ...]:
        """The tiers in which its shape was measured."""
        return self.grid.model.tiers()

    def tier_gain(self, settings: Settings, tier: Tier) -> float | None:
        """How much faster a micro-batch computes in the tier of `settings` than in `tier`; None if not measured."""
        model, size = self.grid.model, settings.micro_batch
        kinds = sorted(name for of_tier, name in model.lines if of_tier == tier)
        both = [name for name in kinds if (settings.tier, name) in model.lines]
        if not both:
            return None
        return model.lines[tier, both[0]].work_s(size) / model.lines[settings.tier, both[0]].work_s(size) - 1

    def dials(self, index: int, *, spans_nodes: bool) -> Settings:
        """The share, ranks, batch, split and tier that reach it."""
        return self.grid.settings(self.row, index, self.sizes[index], spans_nodes=spans_nodes)


def models(candidates: Iterable[Candidate]) -> dict[str, ScalingModel]:
    """One model per shape, from what all its trials measured; unmeasured shapes are left out."""
    groups: dict[str, list[TrialFit]] = defaultdict(list)
    for candidate in candidates:
        if candidate.trial.fit.cells or candidate.trial.fit.known_speed is not None:
            groups[candidate.trial.shape].append(candidate.trial.fit)
    found = {}
    for shape in sorted(groups):
        known = pool([fit for fit in groups[shape] if fit.known_speed is not None]).known_speed
        fits = heapq.nlargest(
            MAX_POOLED, groups[shape], key=lambda fit: (fit.num_observations, *(cell.recent for cell in fit.cells[:1]))
        )
        model = solve_scaling(pool(fits).cells, known)
        if model.is_measured:
            found[shape] = model
    return found


def goodput_tables(candidates: Sequence[Candidate], fleet: Fleet, space: SearchSpace) -> tuple[GoodputTable, ...]:
    """What every trial makes of every size, in order."""
    solved = models(candidates)
    counts = counts_of(fleet, space, candidates)
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, candidate in enumerate(candidates):
        alike[_group_key(candidate, space)].append(position)
    shapes: dict[object, list[_Alike]] = defaultdict(list)
    for key, positions in alike.items():
        first = candidates[positions[0]]
        model, is_prior = _model(first, solved.get(first.trial.shape))
        sizes = sizes_of(first, fleet, space, model.max_workers, counts)
        group = _Alike(tuple(positions), usable_tiers(first), sizes, model, is_prior)
        shapes[key if is_prior else first.trial.shape].append(group)
    found: list[GoodputTable | None] = [None] * len(candidates)
    for groups in shapes.values():
        grid = _Grid(candidates, groups, fleet, space)
        for position, table in grid.goodput_tables():
            found[position] = table
    return tuple(table for table in found if table is not None)


@dataclass(frozen=True, slots=True)
class _Alike:
    """Trials that differ in their noise alone: their positions, and what all of them may use."""

    positions: tuple[int, ...]
    tiers: tuple[Tier, ...]
    sizes: tuple[Size, ...]
    model: ScalingModel
    is_prior: bool


def _model(candidate: Candidate, model: ScalingModel | None) -> tuple[ScalingModel, bool]:
    """The model of a trial, and whether it is a guess because its shape or its tiers were never measured."""
    tiers = usable_tiers(candidate)
    if model is None:
        return prior(candidate.trial.start.micro_batch, tiers), True
    if not set(tiers).isdisjoint(model.tiers()):
        return model, False
    other = model.tiers()[0]
    lines = {(tiers[0], name): line for (tier, name), line in model.lines.items() if tier == other}
    return dataclasses.replace(model, lines=lines), True


def usable_tiers(candidate: Candidate) -> tuple[Tier, ...]:
    """The tiers a trial may use, without those it fled from or that its guard forbids if others are left."""
    trial = candidate.trial
    found = usable(trial.limits.tiers, trial.fit.tiers, trial.fit.banned_tiers, candidate.wish.tier)
    return found or trial.limits.tiers[:1]


def _group_key(candidate: Candidate, space: SearchSpace) -> tuple[object, ...]:
    """Trials of one key differ in their noise alone."""
    trial = candidate.trial
    batch = None if space.tunes_batch else candidate.wish.global_batch
    own = None if space.pools else most_workers(trial.fit)
    return (trial.shape, trial.start, trial.limits, usable_tiers(candidate), trial.fit.micro_batch_cap, batch, own)


class _Grid:
    """Goodput of the trials of one model over sizes and batches, and where its maxima are.

    Speed is worked out once for trials that are alike, efficiency for each. Arrays have a row per group or trial, then
    one per size that any group has, then one per batch. The first axis of pairs is inside one node, across several.
    """

    def __init__(
        self, candidates: Sequence[Candidate], groups: Sequence[_Alike], fleet: Fleet, space: SearchSpace
    ) -> None:
        self._groups = groups
        firsts = [candidates[group.positions[0]] for group in groups]
        sizes = sorted(set().union(*(group.sizes for group in groups)))
        where = {size: column for column, size in enumerate(sizes)}
        self._columns = [[where[size] for size in group.sizes] for group in groups]
        workers = np.array([float(size.workers) for size in sizes]).reshape(1, -1, 1)
        self._micro, self._accum, is_reached = _batches(firsts, space, workers)
        batch = self._micro * self._accum * workers
        measured = groups[0].model.tiers()
        self._tiers = tuple(dict.fromkeys(tier for group in groups for tier in group.tiers if tier in measured))
        rates = self._rates(sizes, fleet, workers, batch)
        self._owners = np.repeat(np.arange(len(groups)), [len(group.positions) for group in groups])
        trials = [candidates[position].trial for group in groups for position in group.positions]
        held = [candidates[position].wish.global_batch for group in groups for position in group.positions]
        noise = np.array([-1.0 if (n := noise_scale(trial.fit)) is None else n for trial in trials])
        base = np.array([float(trial.start.global_batch) for trial in trials])
        efficiency = _efficiency(noise, base, batch[self._owners])
        efficiency[~is_reached[self._owners]] = 0.0
        if space.tunes_batch:
            efficiency[_is_wasted(trials, held, batch[self._owners], efficiency)] = 0.0
        self._best: list[npt.NDArray[np.int64]] = []
        self._goodput: list[list[list[float]]] = []
        for rate in rates:
            goodput = efficiency * rate[self._owners]
            best = goodput.argmax(axis=2) if goodput.size else np.zeros(goodput.shape[:2], dtype=np.int64)
            reached = np.take_along_axis(goodput, best[:, :, None], axis=2)[:, :, 0]
            self._best.append(best)
            self._goodput.append(reached.tolist())

    @property
    def model(self) -> ScalingModel:
        """What its speeds come from."""
        return self._groups[0].model

    def goodput_tables(self) -> Iterator[tuple[int, GoodputTable]]:
        """The position of every trial, and its table."""
        row = 0
        for group, columns in zip(self._groups, self._columns, strict=True):
            for position in group.positions:
                inside, across = (tuple([reached[row][column] for column in columns]) for reached in self._goodput)
                yield (
                    position,
                    GoodputTable(group.sizes, inside, across, group.is_prior, group.model.spread, self, row),
                )
                row += 1

    def settings(self, row: int, index: int, size: Size, *, spans_nodes: bool) -> Settings:
        """The dials of the best goodput of a trial at one of its sizes."""
        group = int(self._owners[row])
        column = self._columns[group][index]
        spans = int(spans_nodes)
        best = int(self._best[spans][row, column])
        return Settings(
            share=size.share,
            micro_batch=int(self._micro[group, column, best]),
            grad_accum=int(self._accum[group, column, best]),
            tier=self._tiers[int(self._chosen[spans, group, column, best])],
            num_workers=size.workers,
        )

    def _rates(self, sizes: Sequence[Size], fleet: Fleet, workers: Array, batch: Array) -> tuple[Array, Array]:
        """Samples/s in the fastest tier that a group may use, inside one node and across; notes which tier that is."""
        model = self._groups[0].model
        speeds = {device.device_type: device.speed for device in fleet.devices}
        slow = _slowness(sizes, fleet, model).reshape(1, -1, 1)
        best = np.zeros((2, *batch.shape))
        self._chosen: npt.NDArray[np.int8] = np.zeros((2, *batch.shape), dtype=np.int8)
        for number, tier in enumerate(self._tiers):
            may = np.array([tier in group.tiers for group in self._groups]).reshape(-1, 1, 1)
            rates = np.zeros_like(best)
            for kind, name in enumerate(fleet.types):
                line = model.line(tier, name, speeds)
                mine = [column for column, size in enumerate(sizes) if size.kind == kind]
                if not mine or line is None:
                    continue
                mine_only = slice(mine[0], mine[-1] + 1)  # sizes are sorted by type
                for spans in (False, True):
                    exists = np.array([_exists(sizes[column], fleet, spans) for column in mine]).reshape(1, -1, 1)
                    parts = (self._micro[:, mine_only], self._accum[:, mine_only], workers[:, mine_only])
                    step_s = model.step_s(line, *parts, spans_nodes=spans)
                    rate = batch[:, mine_only] / (step_s * slow[:, mine_only])
                    rates[int(spans), :, mine_only] = np.where(exists & may, rate, 0.0)
            # A fit from few windows may say that more nodes are faster, which is not to be planned for.
            np.minimum(rates[1], rates[0], out=rates[1], where=rates[0] > 0)
            better = rates > best
            np.copyto(best, rates, where=better)
            np.copyto(self._chosen, number, where=better)
        return best[0], best[1]


def _exists(size: Size, fleet: Fleet, spans: bool) -> bool:
    return size.workers > 1 if spans else size.workers <= fleet.node_sizes[size.kind]


def _slowness(sizes: Sequence[Size], fleet: Fleet, model: ScalingModel) -> Array:
    """Step time at a size over that at one core, and whatever its neighbours on the device cost it."""
    units = [next((d.units for d in fleet.devices if d.device_type == name), 1) for name in fleet.types]
    values = [
        (1 + model.interference * (1 - size.share)) / model.response(size.share * units[size.kind]) for size in sizes
    ]
    return np.array(values, dtype=np.float64).reshape(-1, 1)


def _batches(
    firsts: Sequence[Candidate], space: SearchSpace, workers: Array
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Micro-batches and accumulations to weigh, per group of trials, size and global batch.

    The last array says where so many ranks reach the smallest batch with the accumulation that is allowed.
    """
    limits = [candidate.trial.limits for candidate in firsts]
    caps = [candidate.trial.fit.micro_batch_cap or candidate.trial.limits.max_micro_batch for candidate in firsts]
    largest = np.minimum(_column([each.max_micro_batch for each in limits]), _column(caps))
    least, most = (
        _column([each.min_global_batch for each in limits]),
        _column([each.max_global_batch for each in limits]),
    )
    base = _column([candidate.trial.start.global_batch for candidate in firsts])
    if space.tunes_batch:
        low = np.maximum(least, _column([each.min_micro_batch for each in limits]) * workers)
        high = np.maximum(low, most)
        wanted = low * (high / low) ** np.linspace(0.0, 1.0, NUM_BATCHES)
        wanted = np.concatenate([wanted, np.clip(base, low, high)], axis=2)
    else:
        wanted = _column([candidate.wish.global_batch for candidate in firsts]) + np.zeros_like(workers)
    per_rank = np.maximum(1.0, np.ceil(wanted / workers - 1e-9))
    accum = np.ceil(per_rank / largest)
    alone = _column([each.min_grad_accum_alone for each in limits])
    accum = np.where((workers == 1) & (wanted > base), np.maximum(accum, alone), accum)
    most_accum = _column([each.max_grad_accum or _NO_LIMIT for each in limits])
    per_rank = np.where(accum > most_accum, np.minimum(per_rank, most_accum * largest), per_rank)
    accum = np.minimum(accum, most_accum)
    micro = np.ceil(per_rank / accum)
    over = (micro * accum * workers > most) & (micro > 1)
    fewer = (micro - 1) * accum * workers
    micro = np.where(over & (fewer >= least), micro - 1, micro)
    return micro, accum, (accum < most_accum) | (micro * accum * workers >= least)


def _column(values: Sequence[int]) -> Array:
    """One number per group, to be weighed against sizes and batches."""
    return np.array(values, dtype=np.float64).reshape(-1, 1, 1)


def _efficiency(noise: Array, base: Array, batch: Array) -> Array:
    """Statistical efficiency, one row per trial; see `policies.learn.efficiency` (noise below 0: not known)."""
    known, base = noise[:, None, None], base[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        value: Array = np.where(known < 0, np.minimum(1.0, base / batch), (known + base) / (known + batch))
    return value


def _is_wasted(
    trials: Sequence[TrialView], held: Sequence[int], batch: Array, efficiency: Array
) -> npt.NDArray[np.bool_]:
    """Where a sample of a batch above the start's is worth less than `limits.min_efficiency` allows.

    Up to the batch that a trial holds somewhat less is allowed, so that the noise scale's ups and downs turn nothing.
    """
    least, base, present = (
        np.array(column, dtype=np.float64)[:, None, None]
        for column in (
            [trial.limits.min_efficiency for trial in trials],
            [trial.start.global_batch for trial in trials],
            held,
        )
    )
    wasted: npt.NDArray[np.bool_] = efficiency < np.where(batch <= present, HELD_PART * least, least)
    return wasted & (batch > base)


def reference(table: GoodputTable) -> float:
    """Goodput on one whole device, the best type of them; what speed-ups are counted in. Always above 0."""
    ones = [table.inside[i] for i, size in enumerate(table.sizes) if size.workers == 1 and size.share == 1]
    if ones and max(ones) > 0:
        return max(ones)
    # No single device is allowed: scale the smallest size down as if it were linear.
    best = [
        max(table.inside[i], table.across[i]) / size.devices
        for i, size in enumerate(table.sizes)
        if max(table.inside[i], table.across[i]) > 0
    ]
    return max(best, default=1.0)


def goodput_now(candidate: Candidate, table: GoodputTable, fleet: Fleet) -> float | None:
    """Predicted goodput of what it has, with the best dials; None where it holds nothing or that is no size."""
    if not candidate.seats:
        return None
    size = Size(fleet.type_of[candidate.seats[0]], len(candidate.seats), candidate.share)
    if size not in table.sizes:
        return None
    spans = fleet.num_nodes(candidate.seats) > 1
    value = table.goodput(table.sizes.index(size), spans_nodes=spans)
    return value if value > 0 and math.isfinite(value) else None
