"""What is learned from one trial's telemetry, and the pure functions that advance it.

`update` is called by the controller with summarised observations, live and in a replay alike; `decide` never fits.
Memory is bounded: at most `MAX_CELLS` cells of `WINDOWS_PER_CELL` numbers and one pair of noise averages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.policies.learn.memory import MemoryPoint, merge, remember
from orchestrator.policies.learn.noise import MAX_NOISE_SCALE, NoiseTerms
from orchestrator.policies.learn.speed import (
    MIN_STEPS,
    MIN_WINDOWS,
    WINDOWS_PER_CELL,
    CellKey,
    KnownSpeed,
    Prediction,
    SpeedCell,
    as_known,
    bucket_of,
    solve,
)
from orchestrator.policies.learn.tier_fit import TierFit
from orchestrator.policies.plan import SPARSE, Settings
from orchestrator.policies.tier import Tier, is_cheaper

MAX_CELLS = 48
MIN_NOISE_ESTIMATES = 10
"""Estimates before the noise scale is trusted: one alone has a relative error near one."""
CAP_OBSERVATIONS = 60
"""Observations after which a micro-batch that did not fit may be tried again, twice as many after each failure: other
trials may have left, and the preflight of the ranks stands before the next attempt."""
_MAX_CAP_DOUBLINGS = 6
_MAX_STEPS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Steps of one trial that ran under the same settings, summarised over one telemetry window.

    Attributes:
        cores: compute granted to each rank, in units of its device (cores of a CPU, SM groups of a GPU).
        tier, micro_batch, grad_accum, num_workers: the settings.
        num_steps: steps summarised, >= 1.
        step_s: median seconds per step, everything included (also the waiting that enforces the share).
        noise_trace: mean estimate of tr(Sigma), the per-sample gradient variance, None where not estimated.
        grad_sq: mean estimate of |G|^2, the squared norm of the true gradient, None where not estimated.
        num_noise: number of estimates behind the two.
        num_nodes: nodes that the ranks are spread over.
        device_type: the type of the devices, as in `DeviceView`.
        crowd_share: shares that other trials held on the fullest of its devices, summed.
        memory_bytes: peak memory of a rank in these steps, None where not measured.
        sync_s: seconds per step spent waiting for other ranks, None where not measured.
        is_replayed: whether the steps were replayed from a graph and not executed one kernel at a time. Observed are
            only steps of the mode that these settings have settled on.
    """

    cores: float
    tier: Tier
    micro_batch: int
    grad_accum: int
    num_workers: int
    num_steps: int
    step_s: float
    noise_trace: float | None = None
    grad_sq: float | None = None
    num_noise: int = 0
    num_nodes: int = field(default=1, metadata=SPARSE)
    device_type: str = field(default="", metadata=SPARSE)
    crowd_share: float = field(default=0.0, metadata=SPARSE)
    memory_bytes: int | None = field(default=None, metadata=SPARSE)
    sync_s: float | None = field(default=None, metadata=SPARSE)
    is_replayed: bool = field(default=False, metadata=SPARSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFit:
    """All that is learned about one trial; `TrialFit()` knows nothing.

    Attributes:
        cells: measured speeds, sorted by key.
        num_observations: observations taken in so far; the clock by which the oldest cell is dropped.
        noise_trace, grad_sq: running means of numerator and denominator of the noise scale, kept apart.
        num_noise: estimates behind the two, capped at the horizon of the running mean.
        grad_sq_scatter: running mean of the squared deviations of windows from `grad_sq`, each times its estimates:
            what is seen of the variance of one estimate.
        num_noise_windows: windows behind that, capped.
        banned_tiers: tiers the trial had to flee from by an override; never chosen again for it.
        micro_batch_cap: largest micro-batch still trusted after an override that shrank it, None without one.
        cap_until: value of `num_observations` at which that cap is lifted for another try.
        num_overflows: overrides that shrank the micro-batch so far.
        memory: measured peaks, sorted by key.
        tiers: what the trial found out about its tiers, dearest first; empty where it has no guard.
        known_speed: its step time where that is known; what was measured then does not count.
    """

    cells: tuple[SpeedCell, ...] = ()
    num_observations: int = 0
    noise_trace: float = 0.0
    grad_sq: float = 0.0
    num_noise: int = 0
    grad_sq_scatter: float = field(default=0.0, metadata=SPARSE)
    num_noise_windows: int = field(default=0, metadata=SPARSE)
    banned_tiers: tuple[Tier, ...] = ()
    micro_batch_cap: int | None = None
    cap_until: int = field(default=0, metadata=SPARSE)
    num_overflows: int = field(default=0, metadata=SPARSE)
    memory: tuple[MemoryPoint, ...] = field(default=(), metadata=SPARSE)
    tiers: tuple[TierFit, ...] = field(default=(), metadata=SPARSE)
    known_speed: KnownSpeed | None = field(default=None, metadata=SPARSE)


NOTHING_FITTED = TrialFit()


def update(fit: TrialFit, observations: Sequence[Observation], *, strict: bool = False) -> TrialFit:
    """Take in observations, oldest first, and return the advanced fit. Pure.

    What cannot be true is passed over, since telemetry of a live run may be torn; a simulator asks for `strict`.
    What does not count yet is told by `missing`.

    Raises:
        ValueError: an observation cannot be true, and `strict`.
    """
    cells = {cell.key: cell for cell in fit.cells}
    count = fit.num_observations
    noise = _noise_of(fit)
    memory = fit.memory
    for seen in observations:
        if not _is_possible(seen):
            if strict:
                raise ValueError(f"{seen}; allowed: counts of at least 1, finite seconds and cores above 0")
            continue
        count += 1
        cell = _advance(cells.get(_key_of(seen)), seen, count)
        cells[cell.key] = cell
        if seen.memory_bytes is not None and seen.memory_bytes > 0:
            memory = remember(memory, _point_of(seen, seen.memory_bytes))
        if _has_noise(seen):
            assert seen.noise_trace is not None
            assert seen.grad_sq is not None
            noise = noise.add(seen.noise_trace, seen.grad_sq, seen.num_noise)
    kept = sorted(cells.values(), key=lambda c: -c.seen)[:MAX_CELLS]
    is_capped = fit.micro_batch_cap is not None and count < fit.cap_until
    return dataclasses.replace(
        fit,
        cells=tuple(sorted(kept, key=lambda c: c.key)),
        num_observations=count,
        noise_trace=noise.noise_trace,
        grad_sq=noise.grad_sq,
        num_noise=noise.num_estimates,
        grad_sq_scatter=noise.scatter,
        num_noise_windows=noise.num_windows,
        micro_batch_cap=fit.micro_batch_cap if is_capped else None,
        cap_until=fit.cap_until if is_capped else 0,
        memory=memory,
    )


def predict_step_s(
    fit: TrialFit, *, cores: float, micro_batch: int, grad_accum: int, tier: Tier, num_workers: int
) -> Prediction | None:
    """Seconds per step at the given dials; None where the tier was never measured with that many workers."""
    model = solve(fit.cells, num_workers) if fit.known_speed is None else as_known(fit.known_speed, num_workers, 1)
    return model.predict(cores=cores, micro_batch=micro_batch, grad_accum=grad_accum, tier=tier)


def noise_scale(fit: TrialFit) -> float | None:
    """The simple noise scale tr(Sigma) / |G|^2 in samples, within [1, 2**20]; None before enough estimates.

    Source: McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.9 and appendix A.1; numerator and
    denominator are averaged apart as there and in Pollux (OSDI 2021).
    """
    return None if fit.num_noise < MIN_NOISE_ESTIMATES else _noise_of(fit).scale


def noise_bounds(fit: TrialFit) -> tuple[float, float]:
    """The noise scale if |G|^2 were one standard deviation larger, and smaller; its whole range at first."""
    return (1.0, MAX_NOISE_SCALE) if fit.num_noise < MIN_NOISE_ESTIMATES else _noise_of(fit).bounds


def note_tiers(fit: TrialFit, tiers: tuple[TierFit, ...]) -> TrialFit:
    """Take over what the trial newly says of its tiers."""
    return dataclasses.replace(fit, tiers=tiers)


def inherit(fit: TrialFit) -> TrialFit:
    """What a new trial of the same shape may take over: speeds and memory, neither the noise nor the bans."""
    return TrialFit(
        cells=fit.cells, num_observations=fit.num_observations, memory=fit.memory, known_speed=fit.known_speed
    )


def protect(fit: TrialFit, before: Settings, after: Settings) -> TrialFit:
    """Remember an override from `before` to `after`, so that no policy walks the trial into the same wall again.

    A flight to a dearer tier bans the one it left for good; a smaller micro-batch becomes the cap for a while.
    """
    if is_cheaper(before.tier, after.tier):
        fit = dataclasses.replace(fit, banned_tiers=tuple(sorted({*fit.banned_tiers, before.tier})))
    is_new = fit.micro_batch_cap is None or after.micro_batch < fit.micro_batch_cap
    return capped(fit, after.micro_batch) if is_new and after.micro_batch < before.micro_batch else fit


def capped(fit: TrialFit, micro_batch: int) -> TrialFit:
    """After a larger micro-batch than `micro_batch` did not fit: none above it is trusted for a while."""
    doublings = min(fit.num_overflows, _MAX_CAP_DOUBLINGS)
    return dataclasses.replace(
        fit,
        micro_batch_cap=micro_batch if fit.micro_batch_cap is None else min(fit.micro_batch_cap, micro_batch),
        cap_until=fit.num_observations + CAP_OBSERVATIONS * 2**doublings,
        num_overflows=fit.num_overflows + 1,
    )


def pool(fits: Sequence[TrialFit]) -> TrialFit:
    """Speeds and memory measured by several trials of one shape as one fit, whatever their order; no noise, no bans."""
    groups: dict[CellKey, list[SpeedCell]] = {}
    for fit in fits:
        for cell in fit.cells:
            groups.setdefault(cell.key, []).append(cell)
    cells = tuple(_merge(groups[key]) for key in sorted(groups))
    return TrialFit(
        cells=cells,
        num_observations=max((fit.num_observations for fit in fits), default=0),
        memory=merge(fit.memory for fit in fits),
        known_speed=min((fit.known_speed for fit in fits if fit.known_speed is not None), key=repr, default=None),
    )


def missing(fit: TrialFit) -> tuple[str, ...]:
    """What was observed and does not count yet, and how much more of it is needed; one sentence for each.

    >>> missing(TrialFit(num_noise=4))
    ('the noise scale has 4 of 10 estimates',)
    """
    found = []
    groups: dict[tuple[Tier, int, int], list[SpeedCell]] = {}
    for cell in fit.cells if fit.known_speed is None else ():
        groups.setdefault((cell.tier, cell.num_workers, cell.micro_batch), []).append(cell)
    for (tier, num_workers, micro_batch), cells in sorted(groups.items()):
        num_windows, num_steps = sum(len(cell.recent) for cell in cells), sum(cell.num_steps for cell in cells)
        if num_windows < MIN_WINDOWS or num_steps < MIN_STEPS:
            found.append(
                f"{tier.value} on {num_workers} ranks at micro-batch {micro_batch} has {num_windows} of {MIN_WINDOWS}"
                f" windows and {num_steps} of {MIN_STEPS} steps"
            )
    if 0 < fit.num_noise < MIN_NOISE_ESTIMATES:
        found.append(f"the noise scale has {fit.num_noise} of {MIN_NOISE_ESTIMATES} estimates")
    return tuple(found)


def _noise_of(fit: TrialFit) -> NoiseTerms:
    return NoiseTerms(
        noise_trace=fit.noise_trace,
        grad_sq=fit.grad_sq,
        num_estimates=fit.num_noise,
        scatter=fit.grad_sq_scatter,
        num_windows=fit.num_noise_windows,
    )


def _is_possible(seen: Observation) -> bool:
    """Whether every number that goes into the table can be true."""
    counts = (seen.micro_batch, seen.grad_accum, seen.num_workers, seen.num_steps, seen.num_nodes)
    times = (seen.step_s, seen.cores)
    return (
        min(counts) >= 1
        and 0 <= seen.crowd_share < math.inf
        and all(math.isfinite(value) and value > 0 for value in times)
    )


def _has_noise(seen: Observation) -> bool:
    """Whether the observation carries usable terms of the noise scale."""
    terms = (seen.noise_trace, seen.grad_sq)
    return seen.num_noise > 0 and all(value is not None and math.isfinite(value) for value in terms)


def _key_of(seen: Observation) -> CellKey:
    return (
        seen.tier,
        seen.num_workers,
        seen.micro_batch,
        bucket_of(seen.cores),
        seen.num_nodes,
        seen.device_type,
        _crowd_of(seen),
        _accum_of(seen),
    )


def _accum_of(seen: Observation) -> int:
    """Accumulation where it matters to a cell: ranks synchronise once per step, not per micro-batch."""
    return seen.grad_accum if seen.num_workers > 1 else 1


def _crowd_of(seen: Observation) -> int:
    """What others held, in quarters of a device."""
    return round(4 * seen.crowd_share)


def _point_of(seen: Observation, peak_bytes: int) -> MemoryPoint:
    return MemoryPoint(
        tier=seen.tier, num_workers=seen.num_workers, micro_batch=seen.micro_batch, peak_bytes=peak_bytes
    )


def _advance(cell: SpeedCell | None, seen: Observation, count: int) -> SpeedCell:
    """The cell with one more window; the oldest falls out. Windows of another step mode say nothing any more."""
    if cell is not None and cell.is_replayed is not seen.is_replayed:
        cell = None
    log_cores = math.log(max(seen.cores, 1.0))
    # Below one core the rank is held back for the rest of the time, so its work takes that much less of the step.
    log_work = math.log(seen.step_s / seen.grad_accum) + math.log(min(seen.cores, 1.0))
    old = () if cell is None else cell.recent
    recent = (*old, log_work)[-WINDOWS_PER_CELL:]
    mean_log_cores = log_cores if cell is None else cell.log_cores + (log_cores - cell.log_cores) / len(recent)
    return SpeedCell(
        tier=seen.tier,
        num_workers=seen.num_workers,
        micro_batch=seen.micro_batch,
        bucket=bucket_of(seen.cores),
        log_cores=mean_log_cores,
        recent=recent,
        num_steps=min(_MAX_STEPS, seen.num_steps + (0 if cell is None else cell.num_steps)),
        seen=count,
        num_nodes=seen.num_nodes,
        device_type=seen.device_type,
        crowd=_crowd_of(seen),
        grad_accum=_accum_of(seen),
        sync_ratio=_sync_ratio(cell, seen, len(recent)),
        is_replayed=seen.is_replayed,
    )


def _sync_ratio(cell: SpeedCell | None, seen: Observation, num_windows: int) -> float | None:
    """The running mean of the part of a step that was spent waiting for other ranks."""
    old = None if cell is None else cell.sync_ratio
    if seen.sync_s is None or not 0 <= seen.sync_s < seen.step_s:
        return old
    ratio = seen.sync_s / seen.step_s
    return ratio if old is None else old + (ratio - old) / num_windows


def _merge(cells: Sequence[SpeedCell]) -> SpeedCell:
    """One cell from those of several trials: the middle of all their windows, in the mode that is the faster."""
    fastest = min(cells, key=lambda c: (c.log_work, c.is_replayed))
    cells = [cell for cell in cells if cell.is_replayed is fastest.is_replayed]  # a trial keeps the faster mode
    if len(cells) == 1:
        return cells[0]
    windows = sorted(value for cell in cells for value in cell.recent)
    first = max(0, (len(windows) - WINDOWS_PER_CELL) // 2)
    synced = [cell.sync_ratio for cell in cells if cell.sync_ratio is not None]
    # fsum rounds once, so that the order of the trials cannot show in the last bit.
    log_cores = math.fsum(len(c.recent) * c.log_cores for c in cells) / len(windows)
    return dataclasses.replace(
        cells[0],
        log_cores=log_cores,
        sync_ratio=None if not synced else math.fsum(synced) / len(synced),
        recent=tuple(windows[first : first + WINDOWS_PER_CELL]),
        num_steps=min(_MAX_STEPS, sum(c.num_steps for c in cells)),
        seen=max(c.seen for c in cells),
    )
