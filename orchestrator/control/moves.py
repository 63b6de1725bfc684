"""Trials whose devices the policy chooses: who leaves its slot, who begins where, and what a policy is told. Pure.

With `RunSpec.places` all trials that run or wait are in the snapshot, and the plan says where each shall be. One that
runs elsewhere, or shall not run, commits at its boundary and goes back to the queue; one that waits begins in a free
slot on its devices as soon as what it is granted there was given back. Called by the controller after each decision and
whenever a trial comes, goes or reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from orchestrator.control import grants
from orchestrator.control.departures import told_to_stop
from orchestrator.control.events import Event, TrialAssigned
from orchestrator.control.orders import StopMode
from orchestrator.control.world import Run, Slot, SlotState, Trial, TrialState, World
from orchestrator.policies.plan import Allocation, DeviceId
from orchestrator.policies.snapshot import DeviceView, DialLimits

_EPSILON = 1e-9


def next_departure(run: Run) -> list[Event]:
    """The next trial that is told to leave its slot because the plan in force has it elsewhere, or nowhere."""
    if not run.spec.places or run.is_interrupted:
        return []
    for trial in run.running():
        row = run.plan.allocation(trial.trial_id)
        if row is None or trial.account is None or trial.stop is not StopMode.NONE:
            continue
        if sorted(row.placement) != sorted(trial.account.placement) and stands_at_commit(run, trial):
            return told_to_stop(run, trial, StopMode.MOVE)
    return []


def assignment(world: World, run: Run, may_start: Callable[[Trial], bool]) -> TrialAssigned | None:
    """The next attempt that begins where the plan in force has it; None where none can."""
    for trial in run.waiting():
        row = run.plan.allocation(trial.trial_id)
        if row is None or not row.settings.share > 0:
            continue
        slot = next((slot for slot in _idle_slots(world) if _is_place_of(slot, row)), None)
        if slot is not None and _has_room(world, run, row) and may_start(trial):
            return TrialAssigned(trial_id=trial.trial_id, attempt=trial.attempt, slot_id=slot.slot_id, epoch=slot.epoch)
    return None


def placement_of(run: Run, trial: Trial) -> tuple[DeviceId, ...]:
    """The devices that a trial is on, or on its way to."""
    row = run.plan.allocation(trial.trial_id)
    return () if row is None else row.placement


def devices(world: World) -> tuple[DeviceView, ...]:
    """Devices on which there is a slot that may serve, sorted."""
    return tuple(world.devices[each] for each in sorted(_slots_on(world)) if each in world.devices)


def limits_of(world: World, run: Run, trial: Trial, allowed: DialLimits) -> DialLimits:
    """The limits of a trial that may wait, pause and move; a device has no more parts than it has slots."""
    num_ranks = run.spec.start.num_workers
    has_commit = not run.spec.is_function or trial.state is not TrialState.RUNNING or _has_committed(trial)
    return replace(
        allowed,
        can_move=True,
        can_pause=has_commit,
        min_share=max(run.spec.limits.min_share, 1.0 / _num_parts(world)),
        max_share=1.0,
        min_workers=num_ranks,
        max_workers=num_ranks,
    )


def stands_at_commit(run: Run, trial: Trial) -> bool:
    """Whether a trial can leave without repeating a step: a declared training commits at any boundary.

    A function has checkpoints of its own. Behind a report with one it waits until the search asks for the next report.
    """
    return not run.spec.is_function or (_has_committed(trial) and trial.credit <= len(trial.reports))


def _has_committed(trial: Trial) -> bool:
    return bool(trial.reports and trial.reports[-1].checkpoint)


def _idle_slots(world: World) -> list[Slot]:
    slots = sorted(world.slots.values(), key=lambda slot: slot.slot_id)
    return [slot for slot in slots if slot.state is SlotState.IDLE and not slot.is_closing]


def _is_place_of(slot: Slot, row: Allocation) -> bool:
    return slot.hello is not None and sorted(slot.hello.placement) == sorted(row.placement)


def _has_room(world: World, run: Run, row: Allocation) -> bool:
    """Whether what a trial shall have is free: it does not even load its model beside one that is about to leave."""
    accounts = world.accounts(run)
    return all(
        device_id in world.devices and grants.held(accounts, device_id) + row.settings.share <= 1.0 + _EPSILON
        for device_id in row.placement
    )


def _slots_on(world: World) -> Counter[DeviceId]:
    """Slots on each device that serve, or will when what they do now is over."""
    serving = (slot for slot in world.open_slots() if slot.hello is not None and not slot.is_closing)
    return Counter(device_id for slot in serving if slot.hello is not None for device_id in set(slot.hello.placement))


def _num_parts(world: World) -> int:
    """Trials that can share any device: slots on the one with the fewest, or on average while some are opening."""
    there = _slots_on(world)
    if not there:
        return 1
    num_opening = sum(slot.state is SlotState.OPENING and slot.hello is None for slot in world.slots.values())
    if num_opening:
        return max(1, (sum(there.values()) + num_opening) // len(there))
    return min(there.values())
