"""Trials that go on with another number of ranks: the wish of a plan, the group that opens for it, the move. Pure.

A worker group cannot grow, so another one opens beside it while the trial trains on. Only when that one is there does
the trial commit at its boundary and leave; it is first in the queue, and holds nothing until the new group has begun.
A group that does not open within the patience of the run costs the trial nothing: it stays as it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from orchestrator.control.departures import told_to_stop
from orchestrator.control.events import Event, TrialResized, TrialToldToStop
from orchestrator.control.gain import Pace, efficiency_of
from orchestrator.control.orders import StopMode
from orchestrator.control.placement import free_slots
from orchestrator.control.signals import PaceSeen
from orchestrator.control.world import Run, SlotState, Trial, World
from orchestrator.policies.snapshot import DialLimits


def next_step(world: World, run: Run, now_s: float) -> list[Event]:
    """What happens next on the way of any trial to another size; empty where nothing does now."""
    for trial in run.running():
        wanted = _wish(run, trial, now_s)
        if wanted is not None and (trial.wish is None or trial.wish[0] != wanted):
            text = f"{wanted} ranks instead of {trial.size}"
            return [resized(run, trial, "wanted", wanted, text, run.restart_s)]
        if wanted is None or trial.wish is None or trial.stop is not StopMode.NONE:
            continue
        if free_slots(world, run, wanted):
            return _let_go(run, trial, wanted)
        if now_s - trial.wish[1] > run.spec.resize_patience_s:
            return [_given_up(run, trial, wanted)]
    for trial in (run.trials[trial_id] for trial_id in run.queue):
        # It has left its group, and the new one died before it came: it waits for another, but not for long.
        if trial.num_workers is not None and now_s - trial.queued_at_s > run.spec.resize_patience_s:
            return [_given_up(run, trial, trial.num_workers)]
    return []


def slots_to_open(world: World, run: Run) -> tuple[int, ...]:
    """Sizes of the worker groups that trials wait for and nobody opens yet."""
    if run.is_interrupted:
        return ()
    wanted = Counter(t.wish[0] for t in run.running() if t.wish is not None and t.stop is StopMode.NONE)
    queued = (run.trials[trial_id].num_workers for trial_id in run.queue)
    wanted += Counter(size for size in queued if size is not None)
    there = Counter(slot.num_workers for slot in free_slots(world, run))
    there += Counter(slot.num_workers for slot in world.slots.values() if slot.state is SlotState.OPENING)
    return tuple(sorted((wanted - there).elements()))


def arrived(run: Run, trial: Trial, now_s: float) -> TrialResized | None:
    """A trial acknowledges its first grant: the end of its move, if it has moved."""
    if not trial.is_resized:
        return None
    restart_s = run.restart_s if trial.left_at_s is None else now_s - trial.left_at_s
    return resized(run, trial, "done", trial.size, f"goes on with {trial.size} ranks", restart_s)


def limits_now(run: Run, trial: Trial, now_s: float) -> DialLimits:
    """What a trial's dials can be set to: what its training allows, less the numbers of ranks tried for in vain."""
    limits = run.spec.limits
    if trial.allows is not None:
        return trial.allows.limits
    if limits.min_workers is None or limits.max_workers is None:
        return limits
    vain = [number for number, until_s in trial.refused.items() if until_s > now_s]
    low = max([limits.min_workers, *(number + 1 for number in vain if number < trial.size)])
    high = min([limits.max_workers, *(number - 1 for number in vain if number > trial.size)])
    return replace(limits, min_workers=low, max_workers=high)


def resized(run: Run, trial: Trial, stage: str, num_workers: int, reason: str, restart_s: float | None) -> TrialResized:
    """One stage of a move."""
    return TrialResized(
        run_id=run.spec.run_id,
        trial_id=trial.trial_id,
        attempt=trial.attempt,
        stage=stage,
        num_workers=num_workers,
        reason=reason,
        restart_s=restart_s,
    )


def _wish(run: Run, trial: Trial, now_s: float) -> int | None:
    """Another number of ranks that the plan in force wants; None where it was given up since, or is reached."""
    row = run.plan.allocation(trial.trial_id)
    wanted = None if row is None else row.resize_to
    if wanted is None or wanted == trial.size:
        return None
    limits = limits_now(run, trial, now_s)
    low, high = limits.min_workers, limits.max_workers
    return wanted if low is not None and high is not None and low <= wanted <= high else None


def _let_go(run: Run, trial: Trial, num_workers: int) -> list[Event]:
    """Tell a trial to leave for the group that is there, and keep its pace for the comparison."""
    found: list[Event] = []
    row = run.plan.allocation(trial.trial_id)
    stretch = None if trial.window is None else trial.window.stretch()
    if stretch is not None and row is not None and trial.fit is not None:
        efficiency = efficiency_of(trial.fit, run.spec.start.global_batch, row.settings.global_batch)
        pace = Pace(throughput=stretch.samples_per_s, efficiency=efficiency)
        found.append(PaceSeen(trial_id=trial.trial_id, pace=pace, predicted=row.predicted_gain))
    for event in told_to_stop(run, trial, StopMode.RESIZE):
        assert isinstance(event, TrialToldToStop)
        found.append(replace(event, num_workers=num_workers))
    return found


def _given_up(run: Run, trial: Trial, num_workers: int) -> TrialResized:
    text = f"no group of {num_workers} ranks opened within {run.spec.resize_patience_s:g} s"
    return resized(run, trial, "given_up", num_workers, text, run.restart_s)
