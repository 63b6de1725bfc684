"""The controller: events from worker groups and from the search in, orders and answers out. No Ray, no waiting.

Every method is idempotent, because a caller whose answer was lost asks again. Methods return at once; who has to wait
(a long poll) waits in the actor, which is told through `take_changes` whom to wake.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock
from orchestrator.control.admission import Admission
from orchestrator.control.checks import ShareChecks
from orchestrator.control.continuation import Continuations, requeued
from orchestrator.control.decider import Decider
from orchestrator.control.events import (
    SCHEMA_VERSION,
    Acknowledged,
    Overridden,
    Recovered,
    Reported,
    RunBegan,
    SlotChanged,
    TrialAssigned,
    TrialToldToStop,
)
from orchestrator.control.journal import FILE_NAME, Journal, read_events
from orchestrator.control.lifecycle import Slot, SlotState, Trial, TrialState
from orchestrator.control.nodes import Nodes
from orchestrator.control.orders import (
    Ack,
    Events,
    Outcome,
    OverrideReport,
    Report,
    Resumption,
    SlotHello,
    SlotOrder,
    StopMode,
)
from orchestrator.control.publishing import order_of
from orchestrator.control.recovery import forget_workers, recover
from orchestrator.control.resizing import Resizes
from orchestrator.control.spec import RunSpec
from orchestrator.control.state import RunState
from orchestrator.policies.learn.fit import note_tiers, protect
from orchestrator.policies.plan import Generation, TrialId, changed_dials
from orchestrator.policies.snapshot import Override
from orchestrator.telemetry.record import unpack
from orchestrator.telemetry.store import TelemetryWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the search learns of a trial. `report` is None while it is pending, and at its end."""

    state: TrialState
    report: Report | None = None
    reason: str = ""
    is_last: bool = False


class Controller:
    """One run. All methods run on one event loop."""

    def __init__(self, spec: RunSpec, clock: Clock, incarnation: str) -> None:
        run_dir = Path(spec.run_dir)
        self.state = RunState(spec, clock, Journal(run_dir / FILE_NAME), incarnation)
        self.decider = Decider(self.state)
        self.admission = Admission(self.state)
        self.continuations = Continuations(self.state, self.stop_trial)
        self.nodes = Nodes(
            self.state,
            self.stop_trial,
            lambda slot_id, reason: self.lose_slot(slot_id, reason, is_charged=False),
            self.close_slot,
        )
        self.resizes = Resizes(self.state, self.stop_trial)
        self.checks = ShareChecks(self.state)
        self.telemetry = TelemetryWriter(run_dir / "telemetry")
        self._is_interrupted = False

    def begin(self, start_id: str) -> None:
        """Write the head of a new journal, or take up what an existing one says.

        An entry of the same `start_id` means that only the actor was restarted; otherwise the whole run is started anew
        and the worker groups of the journal are gone.
        """
        spec, state = self.state.spec, self.state
        entries = list(read_events(Path(spec.run_dir) / FILE_NAME))
        if not entries:
            state.log(RunBegan(schema=SCHEMA_VERSION, run_id=spec.run_id, start_id=start_id, spec=spec.to_jsonable()))
        else:
            recover(state, entries)
            are_workers_gone = all(
                each.start_id != start_id for each in entries if isinstance(each, RunBegan | Recovered)
            )
            state.log(Recovered(start_id=start_id, are_workers_gone=are_workers_gone))
            if are_workers_gone:
                forget_workers(state)
                state.telling.begin_again()
        state.journal.sync()

    # The search.

    def submit(self, trial_id: TrialId, params: dict[str, Any], resumption: Resumption | None = None) -> None:
        """Queue a trial of the search, or let a known one go on where the search wants it to."""
        fixed = {name: value for name, value in self.state.spec.params.items() if name not in params}
        self.continuations.submit(trial_id, {**params, **fixed}, resumption)  # those searched are shown first
        self._assign()

    def answer(self, trial_id: TrialId, index: int) -> Answer | None:
        """Report `index` of a trial, or its end; None while it is pending. Asking grants the trial that report."""
        trial = self.state.lifecycle.trials[trial_id]
        self.state.telling.wants(trial_id, index)
        if index < len(trial.reports):
            if not self._is_interrupted and not self.state.may_tell(trial, index):
                return None
            has_failed = trial.state is TrialState.FAILED  # which the search learns when it asks once more
            is_last = trial.state.is_final and not has_failed and index == len(trial.reports) - 1
            is_last |= index == self.state.spec.max_reports - 1  # Tune need not ask once more to learn that
            return Answer(state=trial.state, report=trial.reports[index], reason=trial.reason, is_last=is_last)
        if trial.state.is_final:
            return Answer(state=trial.state, reason=trial.reason, is_last=True)
        if self._is_interrupted and trial.state in {TrialState.QUEUED, TrialState.PAUSED}:
            return Answer(state=trial.state, reason="the run was interrupted", is_last=True)
        if trial.credit <= index:
            trial.credit = index + 1
            self.state.telling.began(trial_id, self.state.clock.now_s())
            self._refresh(trial)
        return None

    def stop_trial(self, trial_id: TrialId, mode: StopMode) -> None:
        """The search has no further use for a trial, or the run is interrupted."""
        trial = self.state.lifecycle.stop(trial_id, mode)
        if trial is None:
            return
        num_workers = trial.moves_to if mode is StopMode.RESIZE else None
        self.state.log(TrialToldToStop(trial_id=trial_id, mode=mode.value, num_workers=num_workers))
        if trial.state.is_final:
            self.state.log_ended(trial)
        self._refresh(trial)
        self.state.changed_trials.add(trial_id)

    def interrupt(self) -> None:
        """Let every running trial commit and leave; nothing is assigned any more."""
        self._is_interrupted = self.continuations.is_interrupted = True
        for trial in self.state.lifecycle.running():
            self.stop_trial(trial.trial_id, StopMode.CHECKPOINT)
        self.state.changed_trials.update(self.state.lifecycle.trials)

    def release(self, trial_id: TrialId) -> None:
        """The search's stand-in of a trial has gone; the trial ends, unless the whole run is only interrupted."""
        self.state.telling.released(trial_id)
        if not self._is_interrupted:
            self.stop_trial(trial_id, StopMode.DISCARD)

    # Worker groups.

    def expect_slot(self, slot_id: str, num_workers: int | None = None) -> None:
        """The supervisor is opening a slot, of that many ranks where they are not those that trials begin with."""
        self.state.lifecycle.expect_slot(slot_id, num_workers)

    def attach(self, hello: SlotHello) -> int:
        """A worker group reports for work; returns its epoch."""
        state = self.state
        state.set_devices(hello.devices)
        carried = state.lifecycle.slots[hello.slot_id].trial_id if hello.slot_id in state.lifecycle.slots else None
        slot, orphan = state.lifecycle.attach(hello)
        if carried is not None:
            state.end_trial(carried)
        state.log(SlotChanged(slot_id=slot.slot_id, state=slot.state.value, epoch=slot.epoch, hello=hello))
        self._log_left(orphan)
        slot.idle_since_s = state.clock.now_s()
        state.publish(slot, state.idle_order(slot))
        self._assign()
        self.resizes.advance()
        state.journal.sync()
        return slot.epoch

    def order(self, slot_id: str, epoch: int) -> SlotOrder | None:
        """The newest order of a slot, or None when its epoch is over (the caller must end)."""
        slot = self.state.lifecycle.slots.get(slot_id)
        if slot is None or slot.epoch != epoch or slot.state in {SlotState.CLOSED, SlotState.LOST}:
            return None
        if slot_id not in self.state.orders:
            self._publish_for(slot)
        return self.state.orders[slot_id]

    def take_events(self, slot_id: str, epoch: int, attempt_of: tuple[TrialId, int], rank: int, events: Events) -> bool:
        """What a rank says happened; False when it speaks for an attempt that is over."""
        state = self.state
        slot = state.lifecycle.slots.get(slot_id)
        is_there = slot is not None and slot.epoch == epoch and slot.trial_id is not None
        trial = state.lifecycle.trials[slot.trial_id] if is_there else None  # type: ignore[union-attr,index]
        if trial is None or (trial.trial_id, trial.attempt) != attempt_of:
            return False
        for message in events.records:
            self._take_records(trial, rank, message)
        if rank == 0:
            for tiers in events.tiers:
                fit = state.fits[trial.trial_id]
                state.fits[trial.trial_id] = note_tiers(fit, tiers.tiers)
            for mode in events.modes:
                state.note_mode(trial.trial_id, mode)
            for dials in events.dials:
                state.note_dials(trial, dials)
            for override in events.overrides:  # before any new grant
                self._take_override(trial, override)
            for ack in events.acks:
                self._take_ack(trial, ack)
            for report in events.reports:
                self._take_report(trial, report)
        return True

    def finish(self, slot_id: str, epoch: int, attempt_of: tuple[TrialId, int], outcome: Outcome) -> None:
        """The trial left its slot on all ranks."""
        state = self.state
        slot = state.lifecycle.slots.get(slot_id)
        if slot is None or slot.epoch != epoch or slot.trial_id is None:
            return
        trial = state.lifecycle.trials[slot.trial_id]
        if (trial.trial_id, trial.attempt) != attempt_of:
            return
        self.resizes.leaving(trial, outcome)
        state.lifecycle.finish(slot, outcome)
        state.end_trial(trial.trial_id)
        slot.idle_since_s = state.clock.now_s()
        self._log_left(trial)
        state.publish(slot, state.idle_order(slot))
        self._assign()
        state.journal.sync()

    def world_size(self, slot_id: str) -> int:
        """Ranks of a slot's worker group; 1 for an unknown one."""
        slot = self.state.lifecycle.slots.get(slot_id)
        return 1 if slot is None or slot.hello is None else len(slot.hello.placement)

    def poison_slot(self, slot_id: str, epoch: int, outcome: Outcome) -> None:
        """One rank raised and the others did not come: the trial fails with that when the group has restarted."""
        slot = self.state.lifecycle.slots.get(slot_id)
        if slot is not None and slot.epoch == epoch:
            self.state.lifecycle.poison(slot_id, outcome)

    def admit(self) -> None:
        """Start what may start by now, let go of nodes that are not wanted, and move on who changes its group.

        Called once a second.
        """
        self.nodes.settle()
        self.admission.observe()
        self._assign()
        self.resizes.advance()

    def lose_slot(self, slot_id: str, reason: str, *, is_charged: bool = True) -> None:
        """A slot ended without being told to, or its node did."""
        state = self.state
        slot = state.lifecycle.slots.get(slot_id)
        carried = None if slot is None else slot.trial_id
        orphan = state.lifecycle.lose_slot(slot_id, reason, is_charged=is_charged)
        if slot is None:
            return
        if carried is not None:
            state.end_trial(carried)
        state.log(SlotChanged(slot_id=slot_id, state=slot.state.value, epoch=slot.epoch, hello=None))
        self._log_left(orphan)
        self._assign()
        state.journal.sync()
        state.changed_slots.add(slot_id)

    def close_slot(self, slot_id: str) -> None:
        """Tell a slot to end when it is idle; its loop returns."""
        slot = self.state.lifecycle.slots.get(slot_id)
        if slot is None or slot.is_closing:
            return
        slot.is_closing = True
        if slot.state is SlotState.IDLE:
            self.state.publish(slot, self.state.idle_order(slot))

    def close_idle_slots(self) -> None:
        """Let go of slots that have had nothing to do for long."""
        state = self.state
        open_slots = state.open_slots()
        if state.lifecycle.queue and not len(open_slots) > state.spec.max_running > 0:
            return  # one that is idle is about to be taken; where more are open than may run, it may be of no use
        free_slots = state.lifecycle.free_slots()
        for slot in open_slots:
            is_idle = slot in free_slots and slot.hello is not None
            if is_idle and state.clock.now_s() - slot.idle_since_s > state.spec.idle_close_s:
                self.close_slot(slot.slot_id)

    def wants_slot(self) -> bool:
        """Whether a closed slot should be opened again: trials wait and none is on its way."""
        if self._is_interrupted or not self.state.lifecycle.has_turn():
            return False
        usual = self.state.spec.start.num_workers
        opening = [slot for slot in self.state.open_slots() if slot.state is SlotState.OPENING]
        is_opening = any(slot.num_workers == usual for slot in opening)
        # One that needs a group of a certain size is served by `slots_to_open`.
        waits = any(self.state.lifecycle.trials[key].num_workers is None for key in self.state.lifecycle.queue)
        return waits and not is_opening

    def slots_to_open(self) -> tuple[int, ...]:
        """Sizes of slots that shall be opened beside the others, for trials that change their number of ranks."""
        return () if self._is_interrupted else self.resizes.slots_to_open()

    def slot_closed(self, slot_id: str) -> None:
        """The slot's loop returned as told."""
        self.state.lifecycle.close_slot(slot_id)
        slot = self.state.lifecycle.slots[slot_id]
        self.state.log(SlotChanged(slot_id=slot_id, state=slot.state.value, epoch=slot.epoch, hello=None))

    def close(self) -> None:
        """Nothing more will come: close journal and tables."""
        self.state.journal.close()
        self.telemetry.close()

    # Decisions.

    def publish_offers(self) -> None:
        """Send out what can be granted now, and let trials go that another group is ready for."""
        self.resizes.advance()
        offered = self.decider.offers()
        if not offered:
            return
        self.state.journal.sync()
        for trial_id in offered:
            self._refresh(self.state.lifecycle.trials[trial_id])

    def take_changes(self) -> tuple[set[str], set[TrialId]]:
        """Slots and trials whose waiters have something to read; forgotten by this call."""
        waited = self.state.telling.ready(self.state.clock.now_s())
        changes = self.state.changed_slots, self.state.changed_trials | waited
        self.state.changed_slots, self.state.changed_trials = set(), set()
        return changes

    # Inside.

    def _assign(self) -> None:
        if self._is_interrupted:
            return
        state = self.state
        for slot, trial in state.lifecycle.assign(self.admission.may_start):
            state.log(
                TrialAssigned(
                    trial_id=trial.trial_id,
                    attempt=trial.attempt,
                    slot_id=slot.slot_id,
                    epoch=slot.epoch,
                )
            )
            state.begin_trial(trial, slot)
            self._refresh(trial)
        state.journal.sync()

    def _refresh(self, trial: Trial) -> None:
        """Publish the order of the slot that carries the trial."""
        slot = self.state.slot_of(trial)
        if slot is not None:
            self._publish_for(slot)

    def _publish_for(self, slot: Slot) -> None:
        self.state.publish(slot, order_of(self.state, slot))

    def _take_records(self, trial: Trial, rank: int, message: bytes) -> None:
        records, window = unpack(message), self.state.windows[trial.trial_id]
        report = window.fold(rank, records, self.state.clock.now_s(), newest_generation=self.state.plan.generation)
        if report.accepted:
            self.telemetry.append_steps(trial.trial_id, trial.attempt, rank, records[report.mask])
        if report.refused:
            logger.warning("telemetry.refused trial=%s rank=%d %s", trial.trial_id, rank, report.reasons)

    def _take_ack(self, trial: Trial, ack: Ack) -> None:
        state = self.state
        before = state.ledger.running_settings(trial.trial_id)
        grant = state.ledger.acknowledge(trial.trial_id, ack.generation)
        if grant is None:
            return
        now_s = state.clock.now_s()
        dials = self.resizes.acknowledged(trial) if before is None else changed_dials(before, grant.settings)
        for dial in dials:
            state.changes_applied[dial] = state.changes_applied.get(dial, 0) + 1
        if dials:
            state.changed_at_s[trial.trial_id] = now_s
        override = state.overrides.get(trial.trial_id)
        if override is not None and override.generation < ack.generation:
            del state.overrides[trial.trial_id]
        committed_s = state.committed_at_s.get(ack.generation, ack.applied_s)
        state.log(
            Acknowledged(
                generation=Generation(ack.generation),
                trial_id=trial.trial_id,
                attempt=trial.attempt,
                step=ack.step,
                settings=ack.settings,
                ack_s=max(0.0, ack.applied_s - committed_s),
                switch_s=ack.switch_s,
                dials=dials,
            )
        )
        self.publish_offers()

    def _take_override(self, trial: Trial, report: OverrideReport) -> None:
        state = self.state
        before = report.instead_of or state.ledger.running_settings(trial.trial_id)
        if not state.ledger.record_override(trial.trial_id, report.number, report.settings, report.generation):
            return
        state.overrides[trial.trial_id] = Override(
            number=report.number, generation=report.generation, settings=report.settings, reason=report.reason
        )
        state.changed_at_s[trial.trial_id] = state.clock.now_s()
        state.meter.forget(trial.trial_id)
        if before is not None and report.is_lasting:
            state.fits[trial.trial_id] = protect(state.fits[trial.trial_id], before, report.settings)
        trial.story.append(f"override {report.number} at step {report.step}: {report.reason}")
        state.log(Overridden(trial_id=trial.trial_id, **{f.name: getattr(report, f.name) for f in fields(report)}))
        state.journal.sync()
        state.wants_decision = True

    def _take_report(self, trial: Trial, report: Report) -> None:
        is_new = self.state.take_report(trial, report)
        entry = Reported.of(trial.trial_id, report)
        # One that comes again too: an actor that died may have had it in the journal alone. Reading drops a second.
        row = {"trial_id": trial.trial_id, "attempt": trial.attempt, **asdict(report), "metrics": entry.metrics}
        self.telemetry.append_results([row])
        if is_new:
            self.state.log(entry)
            self.state.journal.sync()
            self.state.telling.reached(trial, self.state.clock.now_s())
            self.state.changed_trials.add(trial.trial_id)

    def _log_left(self, trial: Trial | None) -> None:
        """Journal what a trial that left its slot is now, and let it go on if the search has asked for that."""
        if trial is None:
            return
        self.state.changed_trials.add(trial.trial_id)
        if trial.state.is_final:
            self.state.log_ended(trial)
        elif trial.state is TrialState.PAUSED:
            self.continuations.log_paused(trial)
        else:
            self.state.log(requeued(trial))
        self.continuations.settled(trial)
