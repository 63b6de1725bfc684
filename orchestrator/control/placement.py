"""Which trial goes to which slot: first come, first served, each in a slot of the size that it needs. Pure.

Where the policy chooses the devices of trials, `moves` says so instead.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.control import moves
from orchestrator.control.events import TrialAssigned
from orchestrator.control.orders import StopMode
from orchestrator.control.world import Run, Slot, SlotState, Trial, World

_EPSILON = 1e-9


def assignment(world: World, run: Run, may_start: Callable[[Trial], bool]) -> TrialAssigned | None:
    """The next attempt that begins now; None where nobody waits, no slot is free, or the next one may not start."""
    if not run.queue or run.is_interrupted or not has_turn(run):
        return None
    if run.spec.places:
        return moves.assignment(world, run, may_start)
    trial = run.trials[run.queue[0]]
    slot = _slot_for(world, run, trial)
    if slot is None or not may_start(trial) or not _has_floor(world, run, slot):
        return None
    return TrialAssigned(trial_id=trial.trial_id, attempt=trial.attempt, slot_id=slot.slot_id, epoch=slot.epoch)


def has_turn(run: Run) -> bool:
    """Whether one more trial may run at the same time."""
    return not run.spec.max_running or len(run.running()) < run.spec.max_running


def free_slots(world: World, run: Run, num_workers: int | None = None) -> list[Slot]:
    """Idle slots that no trial is on its way to, of that size or of any, in the order in which they are taken."""
    promised = [t.moves_to for t in run.running() if t.stop is StopMode.RESIZE and t.moves_to is not None]
    usual = run.spec.start.num_workers
    free = []
    for slot in sorted(world.slots.values(), key=lambda s: (abs(s.num_workers - usual), s.slot_id)):
        if slot.state is not SlotState.IDLE or slot.is_closing:
            continue
        if slot.num_workers in promised:
            promised.remove(slot.num_workers)
        elif num_workers is None or slot.num_workers == num_workers:
            free.append(slot)
    return free


def wants_slot(world: World, run: Run) -> bool:
    """Whether a closed slot should be opened again: trials wait and none is on its way."""
    if run.is_interrupted or not has_turn(run):
        return False
    usual = run.spec.start.num_workers
    is_opening = any(slot.state is SlotState.OPENING and slot.num_workers == usual for slot in world.open_slots())
    # One that needs a group of a certain size is served by `resizing.slots_to_open`.
    waits = any(run.trials[key].num_workers is None for key in run.queue)
    return waits and not is_opening


def idle_slots(world: World, run: Run, now_s: float) -> list[Slot]:
    """Slots that have had nothing to do for so long that they shall close."""
    is_crowded = len(world.open_slots()) > run.spec.max_running > 0
    if run.queue and not is_crowded:
        return []  # one that is idle is about to be taken; where more are open than may run, it may be of no use
    free = (slot for slot in free_slots(world, run) if slot.hello is not None)
    idle = [slot for slot in free if now_s - slot.idle_since_s > run.spec.idle_close_s]
    # A process ends when all of its lanes are closed, and opens them only together.
    needed = {_process_of(slot) for slot in world.open_slots() if slot not in idle and not slot.is_closing}
    return [slot for slot in idle if _process_of(slot) not in needed]


def _process_of(slot: Slot) -> str:
    """The worker group of a slot, which it shares with other lanes where it is one."""
    return slot.slot_id.partition(".")[0]


def _slot_for(world: World, run: Run, trial: Trial) -> Slot | None:
    """The slot that a trial takes now, None where there is none of the size that it needs.

    Of slots that are alike the one whose GPUs have the fewest trials: Ray opens slots on one GPU after the other.
    """
    free = free_slots(world, run, trial.num_workers)
    alike = [slot for slot in free if slot.num_workers == free[0].num_workers]
    return min(alike, key=lambda slot: _crowding(world, slot), default=None)


def _has_floor(world: World, run: Run, slot: Slot) -> bool:
    """Whether the smallest shares of all trials on the devices of a slot fit, those of other runs among them.

    A run that is alone was checked for that when it began.
    """
    if not world.neighbours or slot.hello is None:
        return True
    runs = [run, *(other for each in world.neighbours.values() for other in each.runs.values())]
    for device_id in set(slot.hello.placement):
        floor = run.spec.limits.min_share * slot.hello.placement.count(device_id)
        for other in runs:
            fixed = () if other.spec.places else other.accounts().values()
            floor += sum(other.spec.limits.min_share * account.placement.count(device_id) for account in fixed)
        if floor > 1.0 + _EPSILON:
            return False
    return True


def _crowding(world: World, slot: Slot) -> int:
    """Ranks that compute on the GPUs of a slot now; cores have their own order."""
    others = [other.cards for other in world.slots.values() if other.state is SlotState.RUNNING]
    return sum(cards.count(card) for cards in others for card in set(slot.cards))
