"""Append, apply, perform: how an event becomes real. The imperative shell around `transition.apply`.

An event is written to the journal, then applied to the world; what follows from it outside is done only once it is on
disk. A write that fails leaves the world as it was and raises: whoever sent the message sends it again.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from orchestrator.clock import Clock
from orchestrator.control import effects as fx
from orchestrator.control import snapshots
from orchestrator.control.events import Event
from orchestrator.control.journal import FILE_NAME, Journal, read_run
from orchestrator.control.orders import SlotOrder
from orchestrator.control.publishing import order_of
from orchestrator.control.signals import Signal
from orchestrator.control.spec import RunSpec
from orchestrator.control.transition import apply, refusal
from orchestrator.control.world import World
from orchestrator.errors import JournalError
from orchestrator.policies.plan import TrialId
from orchestrator.telemetry.store import TelemetryWriter

logger = logging.getLogger(__name__)

ROTATE_BYTES = 16 << 20
"""A file of the journal is full at this size: a few hundred decisions on a hundred trials, applied in seconds."""


class Engine:
    """The world of one run, its journal, and what has to be done outside.

    Attributes:
        world: everything known.
        run: the run.
        telemetry: the tables of steps, devices and results.
        trouble: why the newest event could not be written; None when it was.
        wants_decision: whether the plan in force may be out of date.
    """

    def __init__(self, spec: RunSpec, clock: Clock, incarnation: str) -> None:
        run_dir = Path(spec.run_dir)
        self.world, self._applied = snapshots.load(spec) or (World((spec,)), 0)
        self.run = self.world.runs[spec.run_id]
        self.telemetry = TelemetryWriter(run_dir / "telemetry")
        self.trouble: str | None = None
        self.wants_decision = False
        self._clock, self._incarnation = clock, incarnation
        self._journal = Journal(run_dir / FILE_NAME)
        self._pending: list[fx.Effect] = []
        self._published: dict[str, SlotOrder] = {}
        self._slots: set[str] = set()
        self._trials: set[TrialId] = set()

    @property
    def now_s(self) -> float:
        """Seconds of the monotonic clock."""
        return self._clock.now_s()

    @property
    def is_durable(self) -> bool:
        """Whether everything that happened is on disk."""
        return self._journal.is_synced

    def recover(self) -> int:
        """Apply what the journal holds behind the newest snapshot; the number of its last entry.

        Raises:
            JournalError: the journal is damaged.
        """
        spec = self.run.spec
        for event in read_run(Path(spec.run_dir), self._applied):
            found = apply(self.world, relocated(event, spec))
            self._applied = event.seq
            if isinstance(found, fx.Refused):
                logger.warning("journal.refused entry %d: %s", event.seq, found.reason)
        self._pending += [fx.Decide(), *(fx.Publish(slot_id) for slot_id in self.world.slots)]
        return self._applied

    def rotate(self, max_bytes: int = ROTATE_BYTES) -> bool:
        """Begin a new file of the journal where the present one is full, with a snapshot of the world before it."""
        if self._journal.size < max_bytes or not self.is_durable:
            return False
        try:
            snapshots.save(self.world, self.run.spec, self._journal.last_seq)
            self._journal.rotate()
        except OSError as error:
            logger.warning("the journal goes on in its file: %s", error)
            return False
        return True

    def emit(self, *events: Event) -> bool:
        """Let events happen, all of them or none; False where they cannot have happened.

        Raises:
            JournalError: they could not be written, and have not happened.
        """
        if not events:
            return False
        now_s, wall_s, run_id = self._clock.now_s(), self._clock.wall_s(), self.run.spec.run_id
        stamped = [replace(event, t_s=now_s, wall_s=wall_s, run_id=run_id) for event in events]
        reason = refusal(self.world, stamped[0])
        if reason is not None:
            logger.debug("event.refused %s: %s", type(stamped[0]).__name__, reason)
            return False
        try:
            self._append([event for event in stamped if not isinstance(event, Signal)])
        except JournalError as error:
            self.trouble = str(error)
            raise
        for event in stamped:
            found = apply(self.world, event)
            if isinstance(found, fx.Refused):
                logger.error("event.refused %s", found.reason)
            else:
                self._pending += found.effects
        return True

    def sync(self) -> None:
        """Return once everything that happened is on disk; may run in another thread.

        Raises:
            JournalError: it is not yet; a later call tries again.
        """
        try:
            self._journal.sync()
        except JournalError as error:
            self.trouble = str(error)
            raise
        self.trouble = None

    def perform(self) -> None:
        """Do what follows from events that are on disk; nothing while one is not."""
        if not self.is_durable:
            return
        pending, self._pending = self._pending, []
        for effect in dict.fromkeys(each for each in pending if not isinstance(each, fx.Publish)):
            self._perform(effect)
        for slot_id in dict.fromkeys(each.slot_id for each in pending if isinstance(each, fx.Publish)):
            self._publish(slot_id)

    def order(self, slot_id: str) -> SlotOrder | None:
        """The newest order of a slot, None where it never had one."""
        return self._published.get(slot_id)

    def take_changes(self) -> tuple[set[str], set[TrialId]]:
        """Slots and trials whose waiters have something to read; forgotten by this call."""
        changes = self._slots, self._trials
        self._slots, self._trials = set(), set()
        return changes

    def close(self) -> None:
        """Nothing more will come: close journal and tables."""
        try:
            self._journal.close()
        finally:
            self.telemetry.close()

    def abandon(self) -> None:
        """Close the journal of an actor that could not begin."""
        self._journal.abandon()

    def _append(self, events: list[Event]) -> None:
        if events:
            self._journal.append(events)
            self.trouble = None

    def _perform(self, effect: fx.Effect) -> None:
        if isinstance(effect, fx.Wake):
            self._trials.add(effect.trial_id)
        elif isinstance(effect, fx.Decide):
            self.wants_decision = True
        elif isinstance(effect, fx.StoreSteps):
            self.telemetry.append_steps(effect.trial_id, effect.attempt, effect.rank, effect.records)
        elif isinstance(effect, fx.DiscardCommits):
            trials = Path(self.run.spec.run_dir) / "trials"
            shutil.rmtree(trials / effect.trial_id / "checkpoints", ignore_errors=True)
        elif isinstance(effect, fx.Warn):
            logger.warning("%s", effect.text)

    def _publish(self, slot_id: str) -> None:
        """Send a slot its order if it differs from the last; numbers are unique through the actor's incarnation."""
        slot, last = self.world.slots.get(slot_id), self._published.get(slot_id)
        self._slots.add(slot_id)  # also where its epoch is over: its waiter learns that
        if slot is None or not slot.is_open:
            return
        wanted = order_of(self.world, slot)
        if last is None or replace(last, incarnation="", seq=0) != wanted:
            seq = 1 if last is None else last.seq + 1
            self._published[slot_id] = replace(wanted, incarnation=self._incarnation, seq=seq)


def relocated(event: Event, spec: RunSpec) -> Event:
    """An event of the journal for the run as it is called now, with checkpoints where its directory is now."""
    changes: dict[str, object] = {"run_id": spec.run_id}
    checkpoint = getattr(event, "checkpoint", None)
    if checkpoint is not None:
        changes["checkpoint"] = moved(checkpoint, Path(spec.run_dir))
    resumption = getattr(event, "resumption", None)
    if resumption is not None:
        checkpoint = moved(resumption.checkpoint, Path(spec.run_dir))
        changes["resumption"] = replace(resumption, checkpoint=checkpoint)
    return replace(event, **changes)  # type: ignore[arg-type]


def moved(checkpoint: str | None, run_dir: Path) -> str | None:
    """A checkpoint where it is now, if the run's directory was moved or copied since it was written down."""
    if not checkpoint or Path(checkpoint).is_relative_to(run_dir):
        return checkpoint
    _, has_trials, inside = checkpoint.rpartition("/trials/")
    return str(run_dir / "trials" / inside) if has_trials else checkpoint
