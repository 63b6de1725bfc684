"""Whether a trial that stays on its node should go on with another number of ranks: what `goodput_joint` asks for live.

One trial at a time, and only after a rest: its speed on every number of ranks that keeps its global batch is predicted
by the model of `policies.learn.scaling`, on the devices that it holds and on what nobody holds. What a restart costs is
taken off, over the time that is left for it to pay. Once a resize is asked for it is asked for again until it has
happened. Knows no worker group; adds to rows that others have made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.policies.decide.batch import most_micro_batch
from orchestrator.policies.decide.candidates import restart_cost_s, worker_range
from orchestrator.policies.learn.fit import pool
from orchestrator.policies.learn.scaling import ScalingModel, solve_scaling
from orchestrator.policies.plan import Allocation, DeviceId, Effect, Settings, TrialId, can_split, on_ranks
from orchestrator.policies.snapshot import DeviceKind, DeviceView, Snapshot, TrialView

GROWTH = 2
"""Ranks are limited to so many times the most that were measured, because waiting is unknown beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """When a resize is worth it: `min_gain` after the cost of the restart, over at most `horizon_s`."""

    min_gain: float
    cooldown_s: float
    horizon_s: float


@dataclass(frozen=True, slots=True)
class _Option:
    """A number of ranks and what it is predicted to bring: goodput over the present one minus one, cost taken off."""

    num_workers: int
    gain: float
    speedup: float


def with_resizes(snapshot: Snapshot, rows: Sequence[Allocation], terms: Terms) -> list[Allocation]:
    """The rows, at most one of them with another number of ranks to go on with."""
    trials = {trial.trial_id: trial for trial in snapshot.trials}
    asked = {row.trial_id: row for row in snapshot.plan.allocations if row.resize_to is not None}
    moving = [row for row in rows if (old := asked.get(row.trial_id)) and _stands(trials[row.trial_id], row, old)]
    if moving:
        return [_again(row, asked[row.trial_id]) if row in moving else row for row in rows]
    options: dict[TrialId, _Option] = {}
    models: dict[str, ScalingModel] = {}
    for row in rows:
        trial = trials[row.trial_id]
        if _may_be_resized(snapshot, trial, row, terms):
            if trial.shape not in models:
                pooled = pool([other.fit for other in snapshot.trials if other.shape == trial.shape])
                models[trial.shape] = solve_scaling(pooled.cells, pooled.known_speed)
            option = _best(snapshot, (trial, row, models[trial.shape]), rows, terms)
            if option is not None:
                options[trial.trial_id] = option
    if not options:
        return list(rows)
    chosen = min(options, key=lambda trial_id: (-options[trial_id].gain, trial_id))
    return [_asks(row, options[chosen], trials[chosen]) if row.trial_id == chosen else row for row in rows]


def _may_be_resized(snapshot: Snapshot, trial: TrialView, row: Allocation, terms: Terms) -> bool:
    """Whether it has run undisturbed for long enough, with the dials it is to keep."""
    is_settled = snapshot.settings_in_force(trial) == row.settings and trial.override is None
    is_free = trial.limits.can_resize and not (trial.is_protected or trial.is_stale)
    rests = snapshot.now_s - max(trial.changed_at_s, trial.began_at_s) < terms.cooldown_s
    return is_settled and is_free and not rests and row.settings.share > 0


def _stands(trial: TrialView, row: Allocation, old: Allocation) -> bool:
    """Whether what was asked for before may be asked for again."""
    return old.resize_to in _sizes(trial, row.settings)


def _sizes(trial: TrialView, settings: Settings) -> list[int]:
    """The other numbers of ranks that are allowed and keep the global batch."""
    if not trial.limits.can_resize or trial.is_protected:
        return []
    low, high = worker_range(trial)
    return [
        n
        for n in range(low, high + 1)
        if n != len(trial.placement) and can_split(settings, n) and can_split(trial.start, n)
    ]


def _best(
    snapshot: Snapshot, candidate: tuple[TrialView, Allocation, ScalingModel], rows: Sequence[Allocation], terms: Terms
) -> _Option | None:
    """The number of ranks with the largest gain for a trial with its row and model; None where no other is worth it."""
    trial, row, model = candidate
    now = _step_s(model, row.settings, row.settings.share, _devices(snapshot, trial.placement))
    if now is None or trial.throughput_per_s is None:
        return None
    restart_s = restart_cost_s(trial)
    left_s = trial.expected_remaining / trial.throughput_per_s if trial.throughput_per_s > 0 else math.inf
    paid = 1 - restart_s / max(restart_s, min(terms.horizon_s, left_s))
    free = _free(snapshot, trial, rows)
    options = []
    for num_workers in _sizes(trial, row.settings):
        if num_workers > GROWTH * max(model.max_workers, 1):
            continue
        seats, share = _seats(snapshot, free, num_workers)
        share = min(share, trial.limits.max_share)
        if share < trial.limits.min_share:
            continue
        other = on_ranks(row.settings, num_workers, most_micro_batch(trial.limits, trial.fit.micro_batch_cap))
        if other.grad_accum > max(row.settings.grad_accum, trial.limits.max_grad_accum or other.grad_accum):
            continue
        then = _step_s(model, other, share, _devices(snapshot, seats))
        if then is not None:
            options.append(_Option(num_workers, now / then * paid - 1, now / then))
    best = max(options, key=lambda option: (option.gain, -option.num_workers), default=None)
    return best if best is not None and best.gain >= terms.min_gain else None


def _step_s(model: ScalingModel, settings: Settings, share: float, devices: Sequence[DeviceView]) -> float | None:
    """Predicted seconds per step; None where the tier was never measured or a device is gone."""
    if len(devices) != settings.num_workers:
        return None
    speeds = {device.device_type: device.speed for device in devices}
    times = []
    for device in devices:
        line = model.line(settings.tier, device.device_type, speeds)
        if line is None:
            return None
        counts = (np.array([float(n)]) for n in (settings.micro_batch, settings.grad_accum, settings.num_workers))
        spans = len({each.node_id for each in devices}) > 1
        work_s = float(model.step_s(line, *counts, spans_nodes=spans)[0])
        times.append(work_s / model.response(share * device.units))
    return max(times)  # the ranks wait for the slowest


def _devices(snapshot: Snapshot, placement: Sequence[DeviceId]) -> list[DeviceView]:
    known = {device.device_id: device for device in snapshot.devices}
    return [known[device_id] for device_id in placement if device_id in known]


def _free(snapshot: Snapshot, trial: TrialView, rows: Sequence[Allocation]) -> dict[DeviceId, float]:
    """What of each device nobody but the trial has."""
    left = {device.device_id: 1.0 for device in snapshot.devices}
    for row in rows:
        if row.trial_id != trial.trial_id:
            for device_id in row.placement:
                if device_id in left:
                    left[device_id] -= row.settings.share
    return {device_id: max(0.0, share) for device_id, share in left.items()}


def _seats(snapshot: Snapshot, free: dict[DeviceId, float], num_workers: int) -> tuple[tuple[DeviceId, ...], float]:
    """Where so many ranks would have the largest equal share, and that share; one rank per GPU, any number per node."""
    kinds = {device.device_id: device.kind for device in snapshot.devices}
    units = {device.device_id: device.units for device in snapshot.devices}
    best: tuple[float, tuple[DeviceId, ...], float] = (0.0, (), 0.0)
    for share in sorted({free[d] / n for d in free for n in range(1, num_workers + 1)} - {0.0}, reverse=True):
        seats: list[DeviceId] = []
        for device_id in sorted(free, key=lambda d: (-free[d] * units[d], d)):
            room = math.floor(free[device_id] / share + 1e-9)
            room = min(room, 1) if kinds[device_id] is DeviceKind.CUDA else room
            seats += [device_id] * min(room, num_workers - len(seats))
        if len(seats) == num_workers:
            slowest = min(share * units[device_id] for device_id in seats)
            if slowest > best[0]:
                best = slowest, tuple(seats), share
    return best[1], best[2]


def _asks(row: Allocation, option: _Option, trial: TrialView) -> Allocation:
    restart_s = restart_cost_s(trial)
    text = f"{option.num_workers} ranks instead of {len(trial.placement)}: {option.speedup:.2f} times as fast"
    text += f", for {restart_s:.1f} s of restart"
    return _resized(row, option.num_workers, text, gain=option.gain, cost_s=restart_s)


def _again(row: Allocation, old: Allocation) -> Allocation:
    assert old.resize_to is not None, "only what was asked for is asked for again"
    text = f"waits for {old.resize_to} ranks"
    return _resized(row, old.resize_to, text, gain=old.predicted_gain, cost_s=old.cost_s)


def _resized(row: Allocation, num_workers: int, why: str, *, gain: float | None, cost_s: float) -> Allocation:
    """The row, asking for that many ranks to go on with."""
    return dataclasses.replace(
        row,
        resize_to=num_workers,
        effect=Effect.RESTART,
        reason=f"{why}; {row.reason}",
        binding="workers",
        predicted_gain=gain,
        cost_s=cost_s,
    )
