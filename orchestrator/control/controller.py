"""The controller: messages of worker groups, the search and the driver in, events, orders and answers out. No Ray.

Each message becomes events, which `Engine` writes and applies. A message may be sent again after a failure or a lost
answer: what has happened already does not happen twice. Methods return at once; who has to wait (a long poll) waits in
the actor. Questions (`answer`, `order`, `snapshot` ...) change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.clock import Clock
from orchestrator.control import decisions, departures, moves, nodes, placement, resizing, resumption, silence, steering
from orchestrator.control import events as ev
from orchestrator.control import signals as sig
from orchestrator.control.admission import Admission
from orchestrator.control.checks import ShareChecks
from orchestrator.control.engine import Engine
from orchestrator.control.events import Event
from orchestrator.control.fault_events import CommitDamaged
from orchestrator.control.nodes import NodeView
from orchestrator.control.orders import (
    Ack,
    Events,
    Outcome,
    OverrideReport,
    Report,
    Resumption,
    Retry,
    SlotHello,
    SlotOrder,
    StopMode,
)
from orchestrator.control.silence import Silent
from orchestrator.control.spec import RunSpec
from orchestrator.control.trust import Allowance
from orchestrator.control.world import SlotState, Trial, TrialState
from orchestrator.hung import Process
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import Plan, TrialId
from orchestrator.policies.snapshot import Snapshot
from orchestrator.requests import Request
from orchestrator.telemetry.record import unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the search learns of a trial. `report` is None while it is pending, and at its end."""

    state: TrialState
    report: Report | None = None
    reason: str = ""
    is_last: bool = False


class Controller:
    """One run. All methods run on one event loop.

    Attributes:
        engine: what writes and applies events.
        world: everything known.
        run: the run.
        admission: who may start on GPUs.
        checks: whether shares are real.
    """

    def __init__(self, spec: RunSpec, clock: Clock, incarnation: str) -> None:
        self.engine = Engine(spec, clock, incarnation)
        self.world, self.run = self.engine.world, self.engine.run
        self.admission = Admission(self.world, self.run)
        self.checks = ShareChecks(self.world, self.run)
        self._allowance = Allowance()
        self._last_refusal = ""

    def begin(self, start_id: str, retry: Retry = Retry.OUTSIDE) -> None:
        """Write the head of a new journal, or take up what an existing one says.

        A `start_id` that the journal knows means that only the actor was restarted; otherwise the whole run is started
        anew: the worker groups of the journal are gone, and failed trials are tried again as `retry` says.
        """
        spec = self.run.spec
        if not self.engine.recover():
            head = ev.RunBegan(schema=ev.SCHEMA_VERSION, run_id=spec.run_id, start_id=start_id, spec=spec.to_jsonable())
            self.engine.emit(head)
        else:
            is_new = start_id not in self.run.start_ids
            again = departures.retried(self.run, retry) if is_new else []
            here = ev.Recovered(start_id=start_id, are_workers_gone=is_new, schema=ev.SCHEMA_VERSION)
            self.engine.emit(here, *again)
        self.engine.sync()

    # The search.

    def submit(self, trial_id: TrialId, params: dict[str, Any], wanted: Resumption | None = None) -> None:
        """Queue a trial of the search, or let a known one go on where the search wants it to.

        Raises:
            ValueError: a new trial shall go on from a commit of another run.
        """
        run = self.run
        fixed = {name: value for name, value in run.spec.params.items() if name not in params}
        shown = {**params, **fixed}  # those searched are shown first
        self.engine.emit(*resumption.submitted(run, trial_id, shown, wanted))
        if run.why_no_slots:
            self.give_up(run.why_no_slots)
        self.settle()

    def want(self, trial_id: TrialId, index: int) -> None:
        """The search asks for a report of a trial, which grants the trial that report."""
        trial = self.run.trials[trial_id]
        if trial.wanted != index or trial.credit <= index:
            self.engine.emit(sig.ReportWanted(trial_id=trial_id, index=index))
        self.advance_rungs()

    def answer(self, trial_id: TrialId, index: int) -> Answer | None:
        """Report `index` of a trial, or its end; None while it is pending or waits at a rung."""
        run, trial = self.run, self.run.trials[trial_id]
        if index < len(trial.reports):
            if not run.is_interrupted and not run.rungs.is_free(trial_id, index):
                return None
            has_failed = trial.state is TrialState.FAILED  # which the search learns when it asks once more
            is_last = trial.state.is_final and not has_failed and index == len(trial.reports) - 1
            is_last |= index == run.spec.max_reports - 1  # Tune need not ask once more to learn that
            return Answer(state=trial.state, report=trial.reports[index], reason=trial.reason, is_last=is_last)
        if trial.state.is_final:
            return Answer(state=trial.state, reason=trial.reason, is_last=True)
        if run.is_interrupted and trial.state in {TrialState.QUEUED, TrialState.PAUSED}:
            return Answer(state=trial.state, reason="the run was interrupted", is_last=True)
        return None

    def pause(self, trial_id: TrialId) -> None:
        """The search puts a trial aside; it commits and leaves its slot, and may be submitted again."""
        self.engine.emit(*resumption.paused(self.run, trial_id))
        self.settle()

    def pin(self, trial_id: TrialId, num_reports: int) -> dict[str, Any]:
        """Keep the state behind report `num_reports` of a trial; fields of a `Resumption` that names it.

        Raises:
            ValueError: the trial has not reported so often, or that commit is gone.
        """
        trial = self.run.trials.get(trial_id)
        if trial is None or num_reports == 0:
            return {"origin": trial_id, "num_reports": 0, "checkpoint": None, "step": 0, "num_samples": 0}
        kept = str(resumption.pinned_path(self.run, trial, num_reports))
        report = trial.reports[num_reports - 1]
        if report.checkpoint != kept:
            self.engine.emit(ev.CommitPinned(trial_id=trial_id, index=num_reports - 1, checkpoint=kept))
        place = {"origin": trial_id, "num_reports": num_reports, "checkpoint": kept}
        return {**place, "step": report.step, "num_samples": report.num_samples}

    def release(self, trial_id: TrialId) -> None:
        """The search's stand-in of a trial has gone; the trial ends, unless the whole run is only interrupted."""
        trial = self.run.trials.get(trial_id)
        if trial is None:
            return
        self.engine.emit(sig.TrialReleased(trial_id=trial_id))
        if not self.run.is_interrupted:
            self.stop_trial(trial_id, StopMode.DISCARD)
        self.advance_rungs()

    def stop_trial(self, trial_id: TrialId, mode: StopMode) -> None:
        """Tell a trial to leave."""
        self.engine.emit(*departures.told_to_stop(self.run, self.run.trials[trial_id], mode))
        self.settle()

    def interrupt(self) -> None:
        """Let every running trial commit and leave; nothing is assigned any more."""
        if not self.run.is_interrupted:
            self.engine.emit(ev.RunInterrupted())
        for trial in self.run.running():
            self.engine.emit(*departures.told_to_stop(self.run, trial, StopMode.CHECKPOINT))

    def give_up(self, reason: str) -> None:
        """No slot will ever open: trials that wait for one, now or later, fail with that reason."""
        if self.run.why_no_slots != reason:
            self.engine.emit(sig.SlotsGivenUp(reason=reason))
        while self.run.queue:
            self.engine.emit(departures.failed(self.run.trials[self.run.queue[0]], reason))

    def end_paused(self) -> None:
        """The search is over: what it put aside will not go on."""
        self._repeat(lambda: resumption.next_end_of_paused(self.run))

    # People and programs.

    def steer(self, request: Request) -> dict[str, Any]:
        """Do what somebody asks of the run, once; what they are told.

        Raises:
            RequestError: it cannot be done.
        """
        self.engine.emit(*steering.events_of(self.run, request))
        self.settle()
        return steering.answer_of(self.run, request)

    # Worker groups.

    def expect_slot(self, slot_id: str, num_workers: int | None = None) -> None:
        """The supervisor is opening a slot, of that many ranks where they are not those that trials begin with."""
        self.engine.emit(sig.SlotExpected(slot_id=slot_id, num_workers=num_workers or self.run.spec.start.num_workers))

    def attach(self, hello: SlotHello) -> int:
        """A worker group reports for work; returns its epoch. The same processes may report again."""
        slot = self.world.slots.get(hello.slot_id)
        if slot is not None and slot.is_open and slot.hello == hello:
            self.settle()
            return slot.epoch
        epoch = 1 if slot is None else slot.epoch + 1
        here = ev.SlotChanged(slot_id=hello.slot_id, state=SlotState.IDLE.value, epoch=epoch, hello=hello)
        orphans = [] if slot is None else nodes.orphaned(self.world, slot, "its worker group died")
        self.engine.emit(here, *orphans)
        self.settle()
        self.advance_resizes()
        return epoch

    def order(self, slot_id: str, epoch: int) -> SlotOrder | None:
        """The newest order of a slot, or None when its epoch is over (the caller must end)."""
        slot = self.world.slots.get(slot_id)
        if slot is None or slot.epoch != epoch or not slot.is_open:
            return None
        return self.engine.order(slot_id)

    def take_events(self, slot_id: str, epoch: int, attempt: tuple[TrialId, int], rank: int, events: Events) -> bool:
        """What a rank says happened; False when it speaks for an attempt that is over.

        Raises:
            TelemetryError: a message of records is damaged.
        """
        trial = self.world.attempt_in(slot_id, epoch, attempt)
        if trial is None:
            return False
        for message in events.records:
            rows = unpack(message)
            is_again = self.engine.telemetry.alarm is not None  # what the disk did not take is sent again and again
            if is_again or self._allowance.takes((trial.trial_id, rank), len(rows), self.engine.now_s):
                self.engine.emit(sig.RecordsCame(trial_id=trial.trial_id, rank=rank, records=rows))
        if rank == 0:
            self._take_findings(trial, events)
            for override in events.overrides:  # before any new grant
                self._take_override(trial, override)
            for ack in events.acks:
                self._take_ack(trial, ack)
            for report in events.reports:
                self._take_report(trial, report)
        return True

    def finish(self, slot_id: str, epoch: int, attempt: tuple[TrialId, int], outcome: Outcome) -> None:
        """The trial left its slot on all ranks."""
        trial = self.world.attempt_in(slot_id, epoch, attempt)
        if trial is not None:
            self.engine.emit(departures.left(self.run, trial, outcome))
            self.settle()

    def world_size(self, slot_id: str) -> int:
        """Ranks of a slot's worker group; 1 for an unknown one."""
        slot = self.world.slots.get(slot_id)
        return 1 if slot is None or slot.hello is None else len(slot.hello.placement)

    def poison_slot(self, slot_id: str, epoch: int, outcome: Outcome) -> None:
        """One rank raised and the others did not come: that decides about the trial when the group has restarted."""
        self.engine.emit(ev.SlotPoisoned(slot_id=slot_id, epoch=epoch, outcome=outcome))

    def suspect(self, slot_id: str, epoch: int, reason: str) -> None:
        """A GPU failed under a slot of that epoch: the trial in it runs alone from now on."""
        slot = self.world.slots.get(slot_id)
        trial = None if slot is None or slot.epoch != epoch else self.world.trial_in(slot)
        if trial is not None:
            self.engine.emit(ev.TrialSuspected(trial_id=trial.trial_id, reason=reason))

    def note_silence(self, silent: Sequence[Silent]) -> None:
        """Show which trials give no sign of life, and no more which do."""
        for event in silence.noted(self.run, silent):
            self.engine.emit(event)

    def silence_found(self, silent: Silent, found: Process, *, is_restarted: bool) -> None:
        """Write down what was found of a silent rank."""
        self.engine.emit(*silence.found(self.world, silent, found, is_restarted=is_restarted))

    # The driver.

    def lose_slot(self, slot_id: str, reason: str, *, is_charged: bool = True) -> None:
        """A slot ended without being told to, or its node did."""
        slot = self.world.slots.get(slot_id)
        if slot is not None and slot.is_open:
            self.engine.emit(*nodes.slot_lost(self.world, slot, reason, is_charged=is_charged))
            self.settle()

    def close_slot(self, slot_id: str) -> None:
        """Tell a slot to end when it is idle; its loop returns."""
        self.engine.emit(sig.SlotToldToClose(slot_id=slot_id))

    def slot_closed(self, slot_id: str) -> None:
        """The slot's loop returned as told."""
        slot = self.world.slots.get(slot_id)
        if slot is not None and slot.is_open:
            self.engine.emit(ev.SlotChanged(slot_id=slot_id, state=SlotState.CLOSED.value, epoch=slot.epoch))

    def take_nodes(self, present: tuple[NodeView, ...]) -> None:
        """The list of nodes that are there; what differs from the last one has happened since."""
        self._repeat(lambda: nodes.next_change(self.world, self.run, present))
        self.settle()

    # Time passes.

    def settle(self) -> None:
        """What follows from what is known: trials go on that the search wants, leave slots, and start in free ones."""
        self._repeat(lambda: resumption.next_continuation(self.run))
        self._repeat(lambda: moves.next_departure(self.run) or steering.next_pause(self.run))
        self._repeat(lambda: _listed(placement.assignment(self.world, self.run, self.admission.may_start)))

    def admit(self) -> None:
        """Start what may start by now, let go of nodes that are not wanted, and move on who changes its group."""
        self._repeat(lambda: nodes.next_release(self.world, self.run))
        self.admission.observe(self.engine.now_s)
        self.settle()
        self.advance_resizes()

    def advance_rungs(self) -> None:
        """Tell the search of reports whose turn it is."""
        run = self.run
        while True:
            now_s = self.engine.now_s
            opened = [sig.RungOpened(number=each) for each in run.rungs.openable(run.trials, now_s, run.left_s)]
            for each in opened:
                self.engine.emit(each)
            due = run.rungs.due(run.trials, now_s)
            if due is None:
                return
            told: Event = sig.ReportToldAgain(trial_id=due.trial_id, index=due.index)
            if due.is_judged:
                told = ev.ReportTold(trial_id=due.trial_id, index=due.index, place=due.place, held_s=due.held_s)
            self.engine.emit(told)

    def advance_resizes(self) -> None:
        """Let trials go whose new group is there, and forget wishes that nobody fulfilled in time."""
        self._repeat(lambda: resizing.next_step(self.world, self.run, self.engine.now_s))

    def close_idle_slots(self) -> None:
        """Let go of slots that have had nothing to do for long."""
        for slot in placement.idle_slots(self.world, self.run, self.engine.now_s):
            self.close_slot(slot.slot_id)

    def look_at_trials(self) -> None:
        """Note the gain of changes that have settled, and whether shares are real."""
        for trial in self.run.running():
            self.engine.emit(*decisions.realised(trial))
        self.engine.emit(*self.checks.observe(self.engine.now_s))

    # Decisions.

    def learn(self) -> None:
        """Take in what was observed of the running trials since the last time."""
        self.engine.emit(*decisions.learned(self.world, self.run, self.engine.now_s))

    def snapshot(self) -> Snapshot | None:
        """The world as a policy sees it; None when there is nothing to decide."""
        return decisions.snapshot(self.world, self.run, self.engine.now_s)

    def accept(self, snapshot: Snapshot, plan: Plan) -> bool:
        """Take a plan that breaks no invariant: journal it, then make it the target. False when it was refused."""
        violations = check(snapshot, plan)
        if violations:
            self.refuse(snapshot, "the plan breaks invariants", [violation.text for violation in violations])
            return False
        self._last_refusal = ""
        if self.engine.emit(*decisions.committed(self.run, snapshot, plan)):
            logger.info("plan.committed generation=%d %s", plan.generation, plan.reason)
        return True

    def take_part(self, seen: Snapshot, entry: ev.PlanCommitted) -> bool:
        """Take this run's part of a plan for several runs, which breaks no invariant; `seen` is what the run showed."""
        return self.engine.emit(*decisions.committed(self.run, seen, entry.decode()[1], entry))

    def refuse(self, snapshot: Snapshot, reason: str, violations: Sequence[str] = ()) -> None:
        """Note why a decision was not taken, once per reason, and look after trials that have no allocation yet."""
        story = f"{reason}: {'; '.join(violations)}"
        if story != self._last_refusal:
            logger.warning("plan.refused %s; the plan in force stays", story)
            in_force = self.run.plan.generation
            self.engine.emit(ev.PlanRefused(generation=in_force, reason=reason, violations=tuple(violations)))
            self._last_refusal = story
        spare = decisions.stand_in(self.run, snapshot, reason)
        if spare is not None and not check(snapshot, spare):  # more trials than smallest shares have none either
            self.accept(snapshot, spare)

    def offer(self) -> None:
        """Let trials go to where the plan has them, and offer what can be granted now."""
        if self.run.spec.places:
            self.settle()
        self.advance_resizes()
        self.engine.emit(*decisions.offered(self.world, self.run))

    # Inside.

    def _repeat(self, next_step: Callable[[], Sequence[Event]]) -> None:
        """Let happen what follows from the world, until nothing does."""
        while events := next_step():
            if not self.engine.emit(*events):
                logger.error("what should follow was refused: %s", events)
                return

    def _take_findings(self, trial: Trial, events: Events) -> None:
        for tiers in events.tiers:
            self.engine.emit(sig.TiersFound(trial_id=trial.trial_id, report=tiers))
        for mode in events.modes:
            self.engine.emit(sig.StepModeFound(trial_id=trial.trial_id, found=mode))
        for note in events.notes:
            self.engine.emit(sig.TrialNoted(trial_id=trial.trial_id, note=note))
        for found in events.fallbacks:
            damage = CommitDamaged(trial_id=trial.trial_id, attempt=trial.attempt, **asdict(found))
            if "damage" not in trial.notes:
                self.engine.emit(damage)
        for dials in events.dials:
            if trial.allows != dials:
                values = {each.name: getattr(dials, each.name) for each in fields(dials)}
                self.engine.emit(ev.DialsDeclared(trial_id=trial.trial_id, **values))

    def _take_ack(self, trial: Trial, ack: Ack) -> None:
        events = decisions.acknowledged(self.run, trial, ack, self.engine.now_s)
        if events:
            self.engine.emit(*events)
            self.offer()

    def _take_override(self, trial: Trial, report: OverrideReport) -> None:
        values = {each.name: getattr(report, each.name) for each in fields(report)}
        self.engine.emit(ev.Overridden(trial_id=trial.trial_id, **values))

    def _take_report(self, trial: Trial, report: Report) -> None:
        entry = ev.Reported.of(trial.trial_id, report)
        if report.index > len(trial.reports):
            raise ValueError(f"report {report.index} of {trial.trial_id} came before report {len(trial.reports)}")
        self.engine.emit(entry)
        # One that comes again too: an actor that died may have had it in the journal alone. Reading drops a second.
        row = {"trial_id": trial.trial_id, "attempt": trial.attempt, **asdict(report), "metrics": entry.metrics}
        self.engine.telemetry.append_results([row])
        # Before the search can ask for the next report: a function can leave here.
        self._repeat(lambda: moves.next_departure(self.run) or steering.next_pause(self.run))
        self.advance_rungs()


def _listed(event: Event | None) -> list[Event]:
    return [] if event is None else [event]
