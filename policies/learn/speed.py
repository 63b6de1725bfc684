"""How fast a trial computes: a bounded table of measured cells, and the model that is solved from it.

A cell holds the seconds of work of one micro-batch at one (tier, workers, micro-batch, compute); the model says

    step_s = grad_accum * (floor + slope * micro_batch) / response(cores)

with `floor` and `slope` per tier and `response(c) = c` below one core (a duty cycle) and `c ** exponent` above it.
It deliberately knows nothing of trials, noise or plans, and never guesses the speed of a tier that was not measured.
Called by `policies.learn.fit`, which owns the table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from orchestrator.policies.plan import SPARSE
from orchestrator.policies.tier import Tier

WINDOWS_PER_CELL = 5
"""Windows remembered per cell; their lower median shrugs off two slow ones (paused, contended)."""
MIN_WINDOWS = 2
MIN_STEPS = 5
PRIOR_EXPONENT = 0.8
MIN_EXPONENT = 0.3
MAX_EXPONENT = 1.0
LEAST_EXPONENT = -1.0
"""Of cores, where small models may well be slower on two than on one."""
PRIOR_FLOOR_RATIO = 0.4
"""Part of a micro-batch's time that is assumed not to grow with it, until two sizes of one tier were measured."""
_FLOOR_RATIO_SPREAD = 0.15
"""How far from that it usually lies: two sizes measured while somebody else used the machine may say anything."""
_DRIFT = 0.03
"""Speeds measured at different times differ by so much, however little each of them scatters."""
_PRIOR_EXPONENT_WEIGHT = 0.3
_BUCKETS_PER_OCTAVE = 4

CellKey = tuple[Tier, int, int, int, int, str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedCell:
    """What was measured at one setting.

    Attributes:
        tier, num_workers, micro_batch: the setting.
        bucket: compute above one core in quarter octaves; 0 for one core or less, where work scales exactly.
        log_cores: mean natural logarithm of max(cores, 1) of its windows.
        recent: logarithms of the seconds of work per micro-batch (duty cycle taken out), oldest first.
        num_steps: steps behind it, capped.
        seen: number of the observation that touched it last; the oldest cell is dropped first.
        num_nodes: nodes that its ranks were spread over.
        device_type: the type of its devices.
        crowd: quarters of a device that others held beside it (on its fullest device).
        grad_accum: micro-batches per step where several ranks synchronise once per step; 1 for a single rank, whose
            micro-batches are all alike.
        sync_ratio: mean part of a step spent waiting for other ranks, None where nobody measured it.
        is_replayed: whether its steps were replayed from a graph.
    """

    tier: Tier
    num_workers: int
    micro_batch: int
    bucket: int
    log_cores: float
    recent: tuple[float, ...]
    num_steps: int
    seen: int
    num_nodes: int = field(default=1, metadata=SPARSE)
    device_type: str = field(default="", metadata=SPARSE)
    crowd: int = field(default=0, metadata=SPARSE)
    grad_accum: int = field(default=1, metadata=SPARSE)
    sync_ratio: float | None = field(default=None, metadata=SPARSE)
    is_replayed: bool = field(default=False, metadata=SPARSE)

    @property
    def key(self) -> CellKey:
        """What tells it from other cells."""
        return (
            self.tier,
            self.num_workers,
            self.micro_batch,
            self.bucket,
            self.num_nodes,
            self.device_type,
            self.crowd,
            self.grad_accum,
        )

    @property
    def log_work(self) -> float:
        """Lower median of the recent logarithms of seconds of work per micro-batch."""
        return median_low(self.recent)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLine:
    """Compute time of one micro-batch at one unit of a device: `floor_s + slope_s * micro_batch` seconds.

    Attributes:
        tier, device_type: what it holds for. Another type of device differs from a known one by its `speed` alone.
    """

    tier: Tier
    floor_s: float
    slope_s: float
    device_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSpeed:
    """The step time of a shape where it is known and need not be measured; the formula is that of `throughput`.

    Attributes:
        lines: compute time, for each tier and type of device that is known.
        sync_s, sync_rank_s: seconds per step that two ranks of one node wait for each other, and more per further rank.
        node_sync_s, node_sync_rank_s: the same where ranks are on several nodes.
        gamma: overlap of compute and waiting: 1 adds them, 10 takes nearly the larger alone.
        exponent: response to units above one; 1 where a device is counted as one unit.
        interference: relative slow-down per whole device that others hold beside it.
        max_workers: ranks up to which it holds; a policy may plan for twice as many.

    Source of the form: Pollux (OSDI 2021), section 3.2. Its alpha_c and beta_c are floor_s and slope_s, alpha_r and
    beta_r are sync_s and sync_rank_s, alpha_n and beta_n are node_sync_s and node_sync_rank_s.
    """

    lines: tuple[KnownLine, ...]
    max_workers: int
    sync_s: float = 0.0
    sync_rank_s: float = 0.0
    node_sync_s: float = 0.0
    node_sync_rank_s: float = 0.0
    gamma: float = 1.0
    exponent: float = 1.0
    interference: float = 0.0

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("lines=(); allowed: one for each tier and type of device, at least one")
        for line in self.lines:
            if not (line.floor_s >= 0 and line.slope_s >= 0 and 0 < line.floor_s + line.slope_s < math.inf):
                raise ValueError(f"{line}; allowed: finite seconds >= 0, not both 0")
        if self.max_workers < 1:
            raise ValueError(f"max_workers={self.max_workers!r}; allowed: 1 or more ranks")
        if not 1 <= self.gamma <= 10:
            raise ValueError(f"gamma={self.gamma!r}; allowed: 1 to 10")
        for name in ("sync_s", "sync_rank_s", "node_sync_s", "node_sync_rank_s", "interference"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: a finite number >= 0")

    def step_s(self, line: KnownLine, *, micro_batch: int, grad_accum: int, num_workers: int, num_nodes: int) -> float:
        """Seconds per step at one unit per rank."""
        micro_s = line.floor_s + line.slope_s * micro_batch
        alpha, beta = (self.node_sync_s, self.node_sync_rank_s) if num_nodes > 1 else (self.sync_s, self.sync_rank_s)
        wait_s = 0.0 if num_workers == 1 else alpha + beta * (num_workers - 2)
        return (grad_accum - 1) * micro_s + float((micro_s**self.gamma + wait_s**self.gamma) ** (1 / self.gamma))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A predicted step time.

    Attributes:
        step_s: seconds per optimizer step.
        is_measured: whether this tier was measured at this micro-batch (at whatever compute); otherwise the
            number is read off the tier's line.
        rel_uncertainty: about one standard deviation of `step_s`, as a ratio of it.
        rel_scatter: the part of it that comes from the scatter of what was measured, not from reading off a line.
    """

    step_s: float
    is_measured: bool
    rel_uncertainty: float
    rel_scatter: float


def bucket_of(cores: float) -> int:
    """The compute bucket of `cores` > 0.

    >>> bucket_of(0.25), bucket_of(1.0), bucket_of(2.0), bucket_of(15.0)
    (0, 0, 4, 16)
    """
    return round(_BUCKETS_PER_OCTAVE * math.log2(max(cores, 1.0)))


def response(cores: float, exponent: float) -> float:
    """Speed at `cores` relative to one core: linear up to one core, `cores ** exponent` above.

    >>> response(0.5, 0.8), response(1.0, 0.8), round(response(4.0, 0.5), 3)
    (0.5, 1.0, 2.0)
    """
    return cores if cores <= 1.0 else cores**exponent


@dataclass(frozen=True, slots=True)
class Point:
    """Work per micro-batch of one size at one core, and how well it is known."""

    micro_batch: int
    work_s: float
    weight: int
    rel_spread: float
    log_cores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """work_s = floor_s + slope_s * micro_batch; `is_solved` if two sizes or more stand behind it."""

    floor_s: float
    slope_s: float
    is_solved: bool

    def work_s(self, micro_batch: int) -> float:
        """Seconds of one micro-batch of that size."""
        return self.floor_s + self.slope_s * micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedModel:
    """The solved table of one shape of trial with one number of workers. Build it with `solve`.

    Attributes:
        exponent: response to compute above one core.
        points: what was measured, by tier and micro-batch.
        lines: seconds of a micro-batch at one core, by tier.
        known: seconds per step where they are known and nothing has to be measured.
        num_workers: ranks.
        num_nodes: nodes that they are on, as far as `known` asks for it.
    """

    exponent: float = PRIOR_EXPONENT
    known: KnownSpeed | None = None
    num_workers: int = 1
    num_nodes: int = 1
    points: dict[Tier, dict[int, Point]] = field(default_factory=dict)
    lines: dict[Tier, Line] = field(default_factory=dict)

    def is_measured(self, tier: Tier) -> bool:
        """Whether the tier was measured at any micro-batch."""
        return tier in self.lines

    def predict(self, *, cores: float, micro_batch: int, grad_accum: int, tier: Tier) -> Prediction | None:
        """Seconds per step at the given dials; None for a tier that was never measured or without compute."""
        if tier not in self.lines or cores <= 0:
            return None
        if self.known is not None:
            line = next(line for line in self.known.lines if line.tier is tier)
            step_s = self.known.step_s(
                line,
                micro_batch=micro_batch,
                grad_accum=grad_accum,
                num_workers=self.num_workers,
                num_nodes=self.num_nodes,
            )
            step_s /= response(cores, self.exponent)
            return Prediction(step_s=step_s, is_measured=True, rel_uncertainty=0.0, rel_scatter=0.0)
        points = self.points[tier]
        point = points.get(micro_batch)
        nearest = point or min(points.values(), key=lambda p: (abs(math.log(p.micro_batch / micro_batch)), p.work_s))
        work_s = point.work_s if point else self.lines[tier].work_s(micro_batch)
        # Doubling the micro-batch beyond what was measured costs 10 % of certainty on a solved line, else 25 %.
        doubt = 0.1 if self.lines[tier].is_solved else 0.25
        sizes_off = abs(math.log2(micro_batch / nearest.micro_batch))
        log_cores = math.log(max(cores, 1.0))
        cores_off = min(abs(log_cores - x) for x in nearest.log_cores)
        scatter = nearest.rel_spread / math.sqrt(nearest.weight)
        return Prediction(
            step_s=grad_accum * work_s / response(cores, self.exponent),
            is_measured=point is not None,
            rel_uncertainty=math.hypot(scatter, doubt * sizes_off, 0.1 * cores_off),
            rel_scatter=scatter,
        )


def solve(cells: Iterable[SpeedCell], num_workers: int, prior_floor_ratio: float = PRIOR_FLOOR_RATIO) -> SpeedModel:
    """Fit exponent, floors and slopes to the cells of that number of workers.

    A (tier, micro-batch) counts from `MIN_WINDOWS` windows and `MIN_STEPS` steps on. `prior_floor_ratio` is assumed
    where only one size was measured.
    """
    groups: dict[tuple[Tier, int], list[SpeedCell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda c: c.key):
        if cell.num_workers == num_workers and cell.recent:
            groups[cell.tier, cell.micro_batch].append(cell)
    trusted = {
        key: group
        for key, group in ((key, _in_newest_mode(group)) for key, group in groups.items())
        if sum(len(c.recent) for c in group) >= MIN_WINDOWS and sum(c.num_steps for c in group) >= MIN_STEPS
    }
    trusted = {key: _beside_now(group) for key, group in trusted.items()}
    exponent = fit_exponent(trusted.values(), LEAST_EXPONENT)
    points: dict[Tier, dict[int, Point]] = defaultdict(dict)
    for (tier, micro_batch), group in trusted.items():
        points[tier][micro_batch] = _point(micro_batch, group, exponent)
    return SpeedModel(exponent=exponent, points=dict(points), lines=_solve_lines(points, prior_floor_ratio))


def as_known(known: KnownSpeed, num_workers: int, num_nodes: int) -> SpeedModel:
    """The model of that many ranks where the speed is known."""
    lines = {line.tier: Line(line.floor_s, line.slope_s, is_solved=True) for line in reversed(known.lines)}
    return SpeedModel(exponent=known.exponent, known=known, num_workers=num_workers, num_nodes=num_nodes, lines=lines)


def _in_newest_mode(cells: list[SpeedCell]) -> list[SpeedCell]:
    """Cells of the step mode that these settings were last seen in: it is theirs at every share."""
    newest = max(cells, key=lambda c: (c.seen, c.key))
    return [cell for cell in cells if cell.is_replayed is newest.is_replayed]


def _beside_now(cells: Sequence[SpeedCell]) -> list[SpeedCell]:
    """Of cells that differ only in what others held beside them the newest, and older ones until windows are enough.

    Who is beside a trial changes more slowly than it computes, and this model does not know crowds.
    """
    groups: dict[tuple[object, ...], list[SpeedCell]] = defaultdict(list)
    for cell in cells:
        groups[cell.bucket, cell.num_nodes, cell.device_type, cell.grad_accum].append(cell)
    kept = []
    for group in groups.values():
        num_windows = 0
        for cell in sorted(group, key=lambda c: (-c.seen, c.key)):
            if num_windows < WINDOWS_PER_CELL:
                kept.append(cell)
            num_windows += len(cell.recent)
    return sorted(kept, key=lambda c: c.key)


def fit_exponent(groups: Iterable[Sequence[SpeedCell]], least: float = MIN_EXPONENT) -> float:
    """Weighted regression of log work on log cores inside each group, drawn to the prior where there is little.

    It lies between `least` and `MAX_EXPONENT`.
    """
    numerator = _PRIOR_EXPONENT_WEIGHT * PRIOR_EXPONENT
    denominator = _PRIOR_EXPONENT_WEIGHT
    for group in groups:
        total = sum(len(c.recent) for c in group)
        mean_x = sum(len(c.recent) * c.log_cores for c in group) / total
        mean_y = sum(len(c.recent) * c.log_work for c in group) / total
        for cell in group:
            deviation = cell.log_cores - mean_x
            numerator -= len(cell.recent) * deviation * (cell.log_work - mean_y)
            denominator += len(cell.recent) * deviation**2
    return min(MAX_EXPONENT, max(least, numerator / denominator))


def _point(micro_batch: int, group: Sequence[SpeedCell], exponent: float) -> Point:
    """Merge the cells of one tier and size, each brought to one core."""
    weight = sum(len(c.recent) for c in group)
    log_work = sum(len(c.recent) * (c.log_work + exponent * c.log_cores) for c in group) / weight
    spread = sum(abs(value - c.log_work) for c in group for value in c.recent) / weight
    return Point(
        micro_batch=micro_batch,
        work_s=math.exp(log_work),
        weight=weight,
        # 1.25 turns a mean absolute deviation into a standard deviation; 1 % is the least that a timer can claim.
        rel_spread=max(0.01, 1.25 * spread),
        log_cores=tuple(c.log_cores for c in group),
    )


def _solve_lines(points: dict[Tier, dict[int, Point]], prior_floor_ratio: float) -> dict[Tier, Line]:
    """One line per tier; a tier measured at one size borrows the form of the best-known other tier."""
    lines = {
        tier: fit_line(list(sizes.values()), prior_floor_ratio) for tier, sizes in points.items() if len(sizes) > 1
    }
    forms = sorted(lines, key=lambda t: (-sum(p.weight for p in points[t].values()), t))
    for tier, sizes in points.items():
        if tier in lines:
            continue
        (point,) = sizes.values()
        floor_ratio = prior_floor_ratio
        if forms:
            form = lines[forms[0]]
            floor_ratio = form.floor_s / form.work_s(point.micro_batch)
        lines[tier] = Line(
            floor_ratio * point.work_s, (1 - floor_ratio) * point.work_s / point.micro_batch, is_solved=bool(forms)
        )
    return lines


def fit_line(points: Sequence[Point], floor_ratio: float | None = None) -> Line:
    """Least squares of relative errors with floor >= 0 and slope >= 0.

    With a `floor_ratio` the floor is drawn to that part of the best-known size, the more the less the points agree.
    """
    rows = [(p.weight / p.work_s**2, p.micro_batch, p.work_s) for p in points]
    s0 = sum(w for w, _, _ in rows)
    s1 = sum(w * m for w, m, _ in rows)
    s2 = sum(w * m * m for w, m, _ in rows)
    t0 = sum(w * y for w, _, y in rows)
    t1 = sum(w * m * y for w, m, y in rows)
    if floor_ratio is not None:
        known = max(points, key=lambda p: (p.weight, -p.micro_batch))
        spread = max(_DRIFT, sum(p.weight * p.rel_spread for p in points) / sum(p.weight for p in points))
        # One row more: floor - floor_ratio * (floor + slope * size) = 0.
        weight = (spread / _FLOOR_RATIO_SPREAD / known.work_s) ** 2
        a, b = 1 - floor_ratio, -floor_ratio * known.micro_batch
        s0, s1, s2 = s0 + weight * a * a, s1 + weight * a * b, s2 + weight * b * b
    slope = (s0 * t1 - s1 * t0) / (s0 * s2 - s1 * s1)
    floor = (t0 - slope * s1) / s0
    if slope < 0:
        return Line(t0 / s0, 0.0, is_solved=True)
    if floor < 0:
        return Line(0.0, t1 / s2, is_solved=True)
    return Line(floor, slope, is_solved=True)
