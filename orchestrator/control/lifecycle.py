"""The states of slots and trials, as plain state machines: events in, states out. No Ray, no clock, no files.

A slot is a long-lived worker group that serves trials in turn. A trial is queued, runs in a slot, and ends; when its
slot dies it goes back to the front of the queue and resumes from its last commit, a bounded number of times.

    slot:  OPENING -attach-> IDLE -assign-> RUNNING -finish-> IDLE -close-> CLOSED
                ^---- attach again (its processes died; the epoch grows) ----'   LOST: its controller died
    trial: QUEUED -assign-> RUNNING -> DONE | STOPPED | FAILED, or back to QUEUED, or PAUSED until the search goes on
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.control.orders import DialReport, Outcome, Report, Resumption, SlotHello, Status, StopMode
from orchestrator.policies.plan import DeviceId, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind

MAX_OVERFLOWS = 3
"""Times that a trial may run out of memory between two reports before it is failed."""
STORY_LENGTH = 20


class SlotState(StrEnum):
    """Where a slot is in its life."""

    OPENING = "opening"
    IDLE = "idle"
    RUNNING = "running"
    CLOSED = "closed"
    LOST = "lost"


class TrialState(StrEnum):
    """Where a trial is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to the trial."""
        return self in {TrialState.DONE, TrialState.STOPPED, TrialState.FAILED}


@dataclass(slots=True)
class Slot:
    """A worker group. `epoch` fences messages of its earlier processes; `poison` says why its ranks lost each other.

    `num_workers` is how many ranks it has, or will have once it is open.
    """

    slot_id: str
    num_workers: int = 1
    state: SlotState = SlotState.OPENING
    epoch: int = 0
    hello: SlotHello | None = None
    trial_id: TrialId | None = None
    is_closing: bool = False
    idle_since_s: float = 0.0
    poison: Outcome | None = None


@dataclass(slots=True)
class Trial:
    """A trial and its story.

    `num_restarts` counts slots that died under it, `num_overflows` how often it ran out of memory since its last
    report; `resume` holds the dials with which it begins again after that. `token` is that of the last resumption,
    `next` one that waits until the trial has left its slot. A
    suspect was running when its GPU failed.

    `num_workers` is how many ranks its worker group must have, None where any will do; `size` how many it had last.
    `wish` is another number that the plan in force wants, and since when; `moves_to` that number once the trial was
    told to leave for it. `onward` holds the dials with which it goes on there. `refused` are numbers that could not be
    had, each with the time until which they are not tried again. `loss` is the training loss that was seen last, in
    whichever attempt. `allows` is what its training said that it allows of its dials, None where that is all.
    """

    trial_id: TrialId
    index: int
    params: dict[str, Any]
    state: TrialState = TrialState.QUEUED
    attempt: int = 0
    num_restarts: int = 0
    slot_id: str | None = None
    reports: list[Report] = field(default_factory=list)
    checkpoint: str | None = None
    credit: int = 0
    stop: StopMode = StopMode.NONE
    reason: str = ""
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))
    step: int = 0
    num_samples: int = 0
    began_at_s: float = 0.0
    num_overflows: int = 0
    resume: Settings | None = None
    is_suspect: bool = False
    token: str = ""
    next: tuple[dict[str, Any], Resumption] | None = None
    num_workers: int | None = None
    size: int = 0
    wish: tuple[int, float] | None = None
    moves_to: int | None = None
    onward: Settings | None = None
    refused: dict[int, float] = field(default_factory=dict)
    is_resized: bool = False
    loss: float | None = None
    allows: DialReport | None = None

    @property
    def off(self) -> dict[str, str]:
        """Name of each dial that its training does not have, and why."""
        return {} if self.allows is None else dict(self.allows.off)

    @property
    def start(self) -> Settings | None:
        """The dials that its training has of its own; None where they are those of the run file."""
        return None if self.allows is None else self.allows.start


class Lifecycle:
    """All slots and trials of a run: trials begin on `num_workers` ranks, at most `max_running` at a time (0: any)."""

    def __init__(self, restart_budget: int, *, num_workers: int = 1, max_running: int = 0) -> None:
        self._restart_budget, self._num_workers, self._max_running = restart_budget, num_workers, max_running
        self.slots: dict[str, Slot] = {}
        self.trials: dict[TrialId, Trial] = {}
        self._queue: deque[TrialId] = deque()

    @property
    def queue(self) -> tuple[TrialId, ...]:
        """Trials waiting for a slot, next first."""
        return tuple(self._queue)

    def running(self) -> list[Trial]:
        """Trials in a slot, by id."""
        return sorted((t for t in self.trials.values() if t.state is TrialState.RUNNING), key=lambda t: t.trial_id)

    def submit(self, trial_id: TrialId, params: dict[str, Any]) -> Trial | None:
        """Queue a trial; None when it is known already (a resend).

        Of trials that wait for their first attempt the search's first is next: their stand-ins start side by side and
        submit in any order, and who begins first matters to a scheduler that judges each by those before it.
        """
        if trial_id in self.trials:
            return None
        trial = Trial(trial_id=trial_id, index=len(self.trials), params=params)
        trial.story.append("queued")
        self.trials[trial_id] = trial
        place = len(self._queue)
        while place and self.trials[self._queue[place - 1]].attempt == 0 and self._queue[place - 1] > trial_id:
            place -= 1
        self._queue.insert(place, trial_id)
        return trial

    def expect_slot(self, slot_id: str, num_workers: int | None = None) -> None:
        """The supervisor is opening a slot of this name."""
        slot = self.slots.setdefault(slot_id, Slot(slot_id))
        slot.num_workers = num_workers or self._num_workers
        if slot.state in {SlotState.CLOSED, SlotState.LOST}:
            slot.state, slot.is_closing = SlotState.OPENING, False

    def attach(self, hello: SlotHello) -> tuple[Slot, Trial | None]:
        """A worker group is there (again): its slot, and the trial its earlier processes took down."""
        slot = self.slots.setdefault(hello.slot_id, Slot(hello.slot_id))
        orphan = self._take_back(slot, "its worker group died")
        slot.epoch += 1
        slot.state, slot.hello, slot.num_workers = SlotState.IDLE, hello, len(hello.placement)
        return slot, orphan

    def lose_slot(self, slot_id: str, reason: str, *, is_charged: bool = True) -> Trial | None:
        """A slot is gone with its controller or its node; returns the trial it carried."""
        slot = self.slots.get(slot_id)
        if slot is None or slot.state in {SlotState.CLOSED, SlotState.LOST}:
            return None
        orphan = self._take_back(slot, reason, is_charged=is_charged)
        slot.state = SlotState.LOST
        return orphan

    def poison(self, slot_id: str, outcome: Outcome) -> None:
        """The ranks lost each other over one rank's outcome: it ends the trial when the group has restarted."""
        self.slots[slot_id].poison = outcome

    def suspect(self, slot_id: str, epoch: int, reason: str) -> None:
        """A GPU failed under a slot of that epoch: the trial in it is a suspect from now on."""
        slot = self.slots.get(slot_id)
        if slot is not None and slot.epoch == epoch and slot.trial_id is not None:
            trial = self.trials[slot.trial_id]
            trial.is_suspect = True
            trial.story.append(f"the GPU failed under it: {reason}")

    def close_slot(self, slot_id: str) -> None:
        """The slot's loop returned as told."""
        self.slots[slot_id].state = SlotState.CLOSED

    def assign(self, may_start: Callable[[Trial], bool] = lambda _trial: True) -> list[tuple[Slot, Trial]]:
        """Give queued trials to idle slots, first come first served, while the next one may start."""
        pairs = []
        while self._queue and self.has_turn():
            trial = self.trials[self._queue[0]]
            slot = self._slot_for(trial)
            if slot is None or not may_start(trial):
                break
            self.place(trial, slot)
            pairs.append((slot, trial))
        return pairs

    def has_turn(self) -> bool:
        """Whether one more trial may run at the same time."""
        return not self._max_running or len(self.running()) < self._max_running

    def free_slots(self, num_workers: int | None = None) -> list[Slot]:
        """Idle slots that no trial is on its way to, of that size or of any, in the order in which they are taken."""
        promised = [t.moves_to for t in self.running() if t.stop is StopMode.RESIZE and t.moves_to is not None]
        free = []
        for slot in sorted(self.slots.values(), key=lambda s: (abs(s.num_workers - self._num_workers), s.slot_id)):
            if slot.state is not SlotState.IDLE or slot.is_closing:
                continue
            if slot.num_workers in promised:
                promised.remove(slot.num_workers)
            elif num_workers is None or slot.num_workers == num_workers:
                free.append(slot)
        return free

    def _slot_for(self, trial: Trial) -> Slot | None:
        """The slot that a trial takes now, None where there is none of the size that it needs.

        Of slots that are alike the one whose GPUs have the fewest trials: Ray opens slots on one GPU after the other.
        """
        free = self.free_slots(trial.num_workers)
        alike = [slot for slot in free if slot.num_workers == free[0].num_workers]
        return min(alike, key=self._crowding, default=None)

    def _crowding(self, slot: Slot) -> int:
        """Ranks that compute on the GPUs of a slot now; cores have their own order."""
        cards = _cards_of(slot)
        others = (other for other in self.slots.values() if other.state is SlotState.RUNNING)
        return sum(_cards_of(other).count(card) for other in others for card in set(cards))

    def place(self, trial: Trial, slot: Slot) -> None:
        """Put a queued trial into a slot."""
        self.remove_from_queue(trial.trial_id)
        slot.state, slot.trial_id = SlotState.RUNNING, trial.trial_id
        trial.state, trial.slot_id = TrialState.RUNNING, slot.slot_id
        trial.story.append(f"attempt {trial.attempt} began in {slot.slot_id}")

    def put_back(self, trial: Trial, attempt: int) -> None:
        """Put a trial at the front of the queue for its next attempt."""
        trial.state, trial.attempt, trial.stop = TrialState.QUEUED, attempt, StopMode.NONE
        self.remove_from_queue(trial.trial_id)
        self._queue.appendleft(trial.trial_id)

    def go_on(self, trial: Trial) -> None:
        """Queue a trial that is in no slot for its next attempt, behind those that wait."""
        trial.state, trial.stop, trial.reason = TrialState.QUEUED, StopMode.NONE, ""
        trial.attempt += 1
        self.remove_from_queue(trial.trial_id)
        self._queue.append(trial.trial_id)

    def pause(self, trial: Trial) -> None:
        """The trial waits in no slot and no queue until the search lets it go on."""
        self.remove_from_queue(trial.trial_id)
        trial.state, trial.stop, trial.num_workers = TrialState.PAUSED, StopMode.NONE, None
        trial.story.append(f"paused at step {trial.step}")

    def remove_from_queue(self, trial_id: TrialId) -> None:
        """Forget a trial's place in the queue, if it has one."""
        if trial_id in self._queue:
            self._queue.remove(trial_id)

    def add_report(self, trial: Trial, report: Report) -> bool:
        """Take the trial's next report; False for one already taken.

        Raises:
            ValueError: a report is missing in between.
        """
        if report.index < len(trial.reports):
            return False
        if report.index > len(trial.reports):
            raise ValueError(f"report {report.index} of {trial.trial_id} came before report {len(trial.reports)}")
        trial.reports.append(report)
        trial.checkpoint = report.checkpoint or trial.checkpoint
        trial.step, trial.num_samples = report.step, report.num_samples
        trial.num_overflows = 0
        trial.story.append(f"report {report.index} at step {report.step}")
        return True

    def finish(self, slot: Slot, outcome: Outcome) -> Trial | None:
        """The trial left its slot; returns it, or None when the slot carries none (a resend)."""
        if slot.trial_id is None:
            return None
        trial = self.trials[slot.trial_id]
        slot.trial_id, slot.state = None, SlotState.IDLE
        trial.slot_id = None
        trial.step, trial.num_samples = max(trial.step, outcome.step), max(trial.num_samples, outcome.num_samples)
        trial.checkpoint = outcome.checkpoint or trial.checkpoint
        self._settle(trial, outcome)
        return trial

    def stop(self, trial_id: TrialId, mode: StopMode) -> Trial | None:
        """Ask a trial to leave; a queued one ends at once. Returns it when that changed anything."""
        trial = self.trials.get(trial_id)
        if trial is None or trial.state.is_final or trial.stop is mode:
            return None
        trial.stop = mode
        if trial.state in {TrialState.QUEUED, TrialState.PAUSED} and mode is StopMode.DISCARD:
            self.remove_from_queue(trial_id)
            self._end(trial, TrialState.STOPPED, "stopped while it was waiting")
        return trial

    def fail(self, trial_id: TrialId, reason: str) -> Trial:
        """End a trial that waits in the queue."""
        trial = self.trials[trial_id]
        self.remove_from_queue(trial_id)
        self._end(trial, TrialState.FAILED, reason)
        return trial

    def _settle(self, trial: Trial, outcome: Outcome) -> None:
        moves_to, trial.moves_to = trial.moves_to, None
        if outcome.status is Status.INTERRUPTED:
            trial.story.append(f"interrupted at step {outcome.step}")
            if trial.stop is StopMode.PAUSE:
                self.pause(trial)
            elif trial.stop is StopMode.DISCARD:  # said while it was leaving for another reason
                self._end(trial, TrialState.STOPPED, "stopped while it was leaving its slot")
            else:
                if trial.stop is StopMode.RESIZE and moves_to is not None:
                    trial.num_workers = moves_to
                    trial.story.append(f"goes on with {moves_to} ranks")
                self.put_back(trial, trial.attempt + 1)
            return
        if outcome.status is Status.MEMORY:
            self._begin_again(trial, outcome)
            return
        state = {
            Status.DONE: TrialState.DONE,
            Status.STOPPED: TrialState.STOPPED,
            Status.FAILED: TrialState.FAILED,
        }[outcome.status]
        self._end(trial, state, outcome.reason)

    def _take_back(self, slot: Slot, reason: str, *, is_charged: bool = True) -> Trial | None:
        """Put the trial of a dead slot at the front of the queue, or fail it when it used up its restarts."""
        if slot.trial_id is None:
            return None
        trial = self.trials[slot.trial_id]
        slot.trial_id, trial.slot_id, trial.moves_to = None, None, None
        if slot.poison is not None:
            poison, slot.poison = slot.poison, None
            if poison.status is Status.MEMORY:
                self._begin_again(trial, poison)
                return trial
            self._end(trial, TrialState.FAILED, poison.reason)
            return trial
        trial.num_restarts += is_charged
        trial.attempt += 1
        trial.story.append(f"{slot.slot_id} lost: {reason}")
        if trial.stop is StopMode.DISCARD:
            self._end(trial, TrialState.STOPPED, "stopped while its slot was lost")
        elif trial.num_restarts > self._restart_budget:
            self._end(
                trial,
                TrialState.FAILED,
                f"its slot died {trial.num_restarts} times under it; allowed: {self._restart_budget} restarts"
                " (slots.restart_budget)",
            )
        elif trial.stop is StopMode.PAUSE:
            self.pause(trial)
        else:
            self.put_back(trial, trial.attempt)
        return trial

    def _begin_again(self, trial: Trial, outcome: Outcome) -> None:
        """A trial ran out of memory: back to the queue with the dials it asks for, a bounded number of times."""
        trial.num_overflows += 1
        if trial.stop is StopMode.DISCARD:
            self._end(trial, TrialState.STOPPED, "stopped while it ran out of memory")
        elif trial.num_overflows >= MAX_OVERFLOWS:
            text = f"ran out of memory {trial.num_overflows} times since its last report; allowed: {MAX_OVERFLOWS - 1}"
            self._end(trial, TrialState.FAILED, f"{text}; lower dials.batch.max_micro; the last time: {outcome.reason}")
        else:
            trial.resume, trial.onward = outcome.settings or trial.resume, None
            trial.story.append(f"out of memory at step {outcome.step}: {outcome.reason}")
            self.put_back(trial, trial.attempt + 1)

    def _end(self, trial: Trial, state: TrialState, reason: str) -> None:
        trial.state, trial.reason = state, reason
        trial.story.append(f"{state.value}: {reason}" if reason else state.value)


def _cards_of(slot: Slot) -> tuple[DeviceId, ...]:
    """The GPU of each rank of a slot; empty on cores."""
    if slot.hello is None or any(device.kind is not DeviceKind.CUDA for device in slot.hello.devices):
        return ()
    return slot.hello.placement
