"""How fast a shape of trial is on any number of ranks, nodes and types of device: a model fitted to its measured cells.

    step_s = ((accum - 1) * micro + (micro ** gamma + sync ** gamma) ** (1 / gamma)) * crowd / response(cores)
    micro  = floor + slope * micro_batch            per tier and device type; the floor is what launching costs
    sync   = alpha + beta * (workers - 2)           apart inside a node and between nodes; 0 for one worker
    crowd  = 1 + interference * shares of others on the same device

Source: the step time of Pollux (OSDI 2021, section 3.2), with share, interference, tier and device type added.
Synchronisation that was never measured is assumed to cost nothing, so that policies try to grow, but only to twice the
measured ranks (`max_workers`). A tier that was never measured has no speed. The cells and the fit of a line are those
of `speed`, which predicts the step time of a trial on the ranks that it has, with the error of each prediction; this
model extrapolates and has one error for all. Called by the policies that choose ranks or nodes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from orchestrator.policies.learn.speed import (
    MIN_STEPS,
    PRIOR_EXPONENT,
    PRIOR_FLOOR_RATIO,
    KnownSpeed,
    Line,
    Point,
    SpeedCell,
    fit_exponent,
    fit_line,
)
from orchestrator.policies.tier import Tier

Array = npt.NDArray[np.float64]
Pace = tuple[Tier, str]
"""What a line of compute time belongs to: a tier on a type of device."""

MAX_CELLS = 128
MIN_SPREAD = 0.02
INTER_OVER_INTRA = 1.1
"""Between nodes a synchronisation takes at least this much longer than inside one, until it was measured."""
_GAMMAS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Sync:
    """Seconds that ranks wait for each other per step: `alpha_s + beta_s * (workers - 2)`."""

    alpha_s: float = 0.0
    beta_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingModel:
    """The solved model of one shape.

    Attributes:
        lines: compute time of a micro-batch at one core, per tier and device type.
        exponent: response to compute above one core.
        intra, inter: synchronisation inside one node and between nodes.
        gamma: overlap of compute and synchronisation: 1 adds them, 10 takes the larger.
        interference: relative slow-down per whole device that others hold beside it.
        spread: about one standard deviation of its errors on what was measured, as a ratio.
        max_workers: the most ranks that were measured; 0 where nothing was.
    """

    lines: Mapping[Pace, Line] = field(default_factory=dict)
    exponent: float = PRIOR_EXPONENT
    intra: Sync = Sync()
    inter: Sync = Sync()
    gamma: float = 1.0
    interference: float = 0.0
    spread: float = 0.5
    max_workers: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether any speed is known."""
        return bool(self.lines)

    def line(self, tier: Tier, device_type: str, speeds: Mapping[str, float]) -> Line | None:
        """Compute time on a device type; one that was not measured is assumed to differ by its `speed` alone."""
        found = self.lines.get((tier, device_type))
        if found is not None:
            return found
        known = sorted(name for of_tier, name in self.lines if of_tier is tier)
        if not known:
            return None
        other = self.lines[tier, known[0]]
        ratio = speeds.get(known[0], 1.0) / speeds.get(device_type, 1.0)
        return Line(other.floor_s * ratio, other.slope_s * ratio, is_solved=False)

    def tiers(self) -> tuple[Tier, ...]:
        """The tiers that were measured, sorted."""
        return tuple(sorted({tier for tier, _ in self.lines}))

    def response(self, cores: float) -> float:
        """Speed at `cores` relative to one core."""
        return cores if cores <= 1 else cores**self.exponent

    def step_s(self, line: Line, micro_batch: Array, grad_accum: Array, workers: Array, *, spans_nodes: bool) -> Array:
        """Seconds per step at one core per rank, without others on the device, elementwise."""
        micro = line.floor_s + line.slope_s * micro_batch
        sync = self.inter if spans_nodes else self.intra
        wait = np.where(workers > 1, sync.alpha_s + sync.beta_s * np.maximum(workers - 2, 0), 0.0)
        last: Array = (micro**self.gamma + wait**self.gamma) ** (1 / self.gamma)
        return (grad_accum - 1) * micro + last


def prior(micro_batch: int, tiers: Sequence[Tier]) -> ScalingModel:
    """A model for a shape nobody has run: every tier alike, a micro-batch takes one unknown unit of time."""
    line = Line(PRIOR_FLOOR_RATIO, (1 - PRIOR_FLOOR_RATIO) / micro_batch, is_solved=False)
    return ScalingModel(lines={(tier, ""): line for tier in tiers})


@dataclass(frozen=True, slots=True)
class _Seen:
    """One cell as the model needs it: a whole step and the compute of one micro-batch, both at one core."""

    cell: SpeedCell
    step_s: float
    micro_s: float | None


def solve_scaling(cells: Iterable[SpeedCell], known: KnownSpeed | None = None) -> ScalingModel:
    """Fit the model to the cells of one shape; those with too few steps do not count. What is known stands as it is."""
    if known is not None:
        return ScalingModel(
            lines={
                (line.tier, line.device_type): Line(line.floor_s, line.slope_s, is_solved=True) for line in known.lines
            },
            exponent=known.exponent,
            intra=Sync(known.sync_s, known.sync_rank_s),
            inter=Sync(known.node_sync_s, known.node_sync_rank_s),
            gamma=known.gamma,
            interference=known.interference,
            spread=0.0,
            max_workers=known.max_workers,
        )
    usable = [cell for cell in cells if cell.recent and cell.num_steps >= MIN_STEPS]
    usable = sorted(usable, key=lambda cell: (-cell.num_steps, cell.key))[:MAX_CELLS]
    if not usable:
        return ScalingModel()
    exponent = _exponent(usable)
    seen = [_seen(cell, exponent) for cell in usable]
    alone = [one for one in seen if one.cell.crowd == 0] or seen
    lines = _lines(alone)
    gamma, intra, inter = _sync(alone, lines)
    max_workers = max(cell.num_workers for cell in usable)
    model = ScalingModel(lines=lines, exponent=exponent, intra=intra, inter=inter, gamma=gamma, max_workers=max_workers)
    ratios = [(one, math.log(one.step_s / predicted)) for one in seen if (predicted := _predict(model, one)) > 0]
    errors = [error for one, error in ratios if one.cell.crowd == 0] or [0.0]
    spread = max(MIN_SPREAD, math.sqrt(math.fsum(error**2 for error in errors) / len(errors)))
    return ScalingModel(
        lines=lines,
        exponent=exponent,
        intra=intra,
        inter=inter,
        gamma=gamma,
        interference=_interference(ratios),
        spread=spread,
        max_workers=max_workers,
    )


def _exponent(cells: Sequence[SpeedCell]) -> float:
    """The response to cores, whatever was beside them: others hold what a trial does not, so crowd goes with share."""
    groups: dict[tuple[object, ...], list[SpeedCell]] = defaultdict(list)
    for cell in cells:
        rest = (cell.num_nodes, cell.device_type, cell.grad_accum)
        groups[(cell.tier, cell.num_workers, cell.micro_batch, *rest)].append(cell)
    return fit_exponent([group for group in groups.values() if len(group) > 1])


def _seen(cell: SpeedCell, exponent: float) -> _Seen:
    work_s = math.exp(cell.log_work + exponent * cell.log_cores)
    step_s = work_s * cell.grad_accum
    if cell.num_workers == 1:
        return _Seen(cell, step_s, work_s)
    if cell.sync_ratio is None:
        return _Seen(cell, step_s, None)
    return _Seen(cell, step_s, step_s * (1 - cell.sync_ratio) / cell.grad_accum)


def _lines(seen: Sequence[_Seen]) -> dict[Pace, Line]:
    """One line per tier and type; where no compute time is known, whole steps stand in for it."""
    groups: dict[Pace, list[_Seen]] = defaultdict(list)
    for one in seen:
        groups[one.cell.tier, one.cell.device_type].append(one)
    sizes: dict[Pace, list[Point]] = {}
    for pace in sorted(groups):
        known = [one for one in groups[pace] if one.micro_s is not None]
        if not known:
            fewest = min(one.cell.num_workers for one in groups[pace])
            known = [one for one in groups[pace] if one.cell.num_workers == fewest]
        by_size: dict[int, list[float]] = defaultdict(list)
        for one in known:
            by_size[one.cell.micro_batch].append(
                one.step_s / one.cell.grad_accum if one.micro_s is None else one.micro_s
            )
        sizes[pace] = [
            Point(size, math.exp(math.fsum(map(math.log, times)) / len(times)), len(times), 0.0, ())
            for size, times in sorted(by_size.items())
        ]
    lines = {pace: fit_line(points) for pace, points in sizes.items() if len(points) > 1}
    solved = dict(lines)
    for pace, points in sizes.items():
        if pace not in solved:
            floor_s = _floor_ratio(pace, points[0].micro_batch, solved) * points[0].work_s
            lines[pace] = Line(floor_s, (points[0].work_s - floor_s) / points[0].micro_batch, is_solved=False)
    return {pace: lines[pace] for pace in sizes}


def _floor_ratio(pace: Pace, micro_batch: int, solved: Mapping[Pace, Line]) -> float:
    """Part of a micro-batch's time that does not grow with it: as in another tier on that type of device, if known."""
    form = next((line for (_, name), line in solved.items() if name == pace[1]), None)
    return PRIOR_FLOOR_RATIO if form is None else form.floor_s / form.work_s(micro_batch)


def _sync(seen: Sequence[_Seen], lines: Mapping[Pace, Line]) -> tuple[float, Sync, Sync]:
    """The overlap and the two synchronisations that explain the steps of several ranks best."""
    several = [one for one in seen if one.cell.num_workers > 1]
    if not several:
        return 1.0, Sync(), Sync()
    best: tuple[float, float, Sync, Sync] | None = None
    for gamma in _GAMMAS:
        intra = _fit_sync([one for one in several if one.cell.num_nodes == 1], lines, gamma)
        inter = _fit_sync([one for one in several if one.cell.num_nodes > 1], lines, gamma)
        if inter is None:
            base = intra or Sync()
            inter = Sync(base.alpha_s * INTER_OVER_INTRA, base.beta_s * INTER_OVER_INTRA)
        model = ScalingModel(lines=lines, intra=intra or Sync(), inter=inter, gamma=gamma)
        error = math.fsum(math.log(one.step_s / _predict(model, one)) ** 2 for one in several) / len(several)
        error += 1e-6 * (gamma - 1) ** 2  # a small gamma where the data do not tell
        if best is None or error < best[0]:
            best = (error, gamma, intra or Sync(), inter)
    assert best is not None
    return best[1:]


def _fit_sync(seen: Sequence[_Seen], lines: Mapping[Pace, Line], gamma: float) -> Sync | None:
    """Least squares of the waiting that is left when compute is taken out; None without any such step."""
    if not seen:
        return None
    rows = []
    for one in seen:
        cell = one.cell
        micro = one.micro_s
        if micro is None:
            micro = lines[cell.tier, cell.device_type].work_s(cell.micro_batch)
        rest = max(one.step_s - (cell.grad_accum - 1) * micro, micro)
        wait = max(0.0, rest**gamma - micro**gamma) ** (1 / gamma)
        rows.append((1 / one.step_s**2, float(cell.num_workers - 2), wait))
    s0 = math.fsum(w for w, _, _ in rows)
    s1 = math.fsum(w * x for w, x, _ in rows)
    s2 = math.fsum(w * x * x for w, x, _ in rows)
    t0 = math.fsum(w * y for w, _, y in rows)
    t1 = math.fsum(w * x * y for w, x, y in rows)
    determinant = s0 * s2 - s1 * s1
    if determinant <= 1e-9 * s0 * max(s2, 1e-300):
        return Sync(t0 / s0, 0.0)
    beta_s = (s0 * t1 - s1 * t0) / determinant
    alpha_s = (t0 - beta_s * s1) / s0
    if beta_s < 0:
        return Sync(t0 / s0, 0.0)
    if alpha_s < 0:
        return Sync(0.0, t1 / s2)
    return Sync(alpha_s, beta_s)


def _predict(model: ScalingModel, one: _Seen) -> float:
    cell = one.cell
    line = model.lines[cell.tier, cell.device_type]
    micro = line.work_s(cell.micro_batch)
    if cell.num_workers == 1:
        return cell.grad_accum * micro
    sync = model.intra if cell.num_nodes == 1 else model.inter
    wait = sync.alpha_s + sync.beta_s * (cell.num_workers - 2)
    last = float((micro**model.gamma + wait**model.gamma) ** (1 / model.gamma))
    return (cell.grad_accum - 1) * micro + last


def _interference(ratios: Sequence[tuple[_Seen, float]]) -> float:
    """Relative slow-down per device of others' shares, drawn to none where few crowded steps were measured."""
    crowded = [(one.cell.crowd / 4, math.exp(error) - 1) for one, error in ratios if one.cell.crowd > 0]
    if not crowded:
        return 0.0
    top = math.fsum(crowd * slower for crowd, slower in crowded)
    return max(0.0, top / (0.1 + math.fsum(crowd**2 for crowd, _ in crowded)))
