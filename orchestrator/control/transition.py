"""`apply`: the one function that changes the world, by one event. Deterministic; no clock, no files, no Ray.

The controller applies what it has written to the journal, and a restarted one applies what the journal holds: both have
the same world after the same events. An event that cannot have happened is refused with the reason and changes nothing.
Events of trials are in `trial_changes`, telemetry in `seen_changes`, those of slots, nodes and plans in
`shared_changes`, requests in `steering`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.control import events as ev
from orchestrator.control import fault_changes as faults
from orchestrator.control import fault_events as fev
from orchestrator.control import seen_changes as seen
from orchestrator.control import shared_changes as shared
from orchestrator.control import signals as sig
from orchestrator.control import steering
from orchestrator.control import trial_changes as trials
from orchestrator.control.effects import Applied, Decide, Effect, Publish, Refused, Wake
from orchestrator.control.events import Event
from orchestrator.control.requested import RequestTaken
from orchestrator.control.world import Run, World

Change = Callable[[World, Run, Any], tuple[Effect, ...]]
Refusal = Callable[[World, Run, Any], str | None]


def _nothing(_world: World, _run: Run, _event: Event) -> tuple[Effect, ...]:
    """The event is written for people and for checks; it changes nothing here."""
    return ()


def _always(_world: World, _run: Run, _event: Event) -> None:
    """The event can happen at any time."""


_RULES: dict[type[Event], tuple[Refusal, Change]] = {
    ev.RunBegan: (_always, shared.begin_run),
    ev.Recovered: (_always, shared.recover),
    ev.RunInterrupted: (_always, shared.interrupt),
    ev.RunEnded: (_always, _nothing),
    ev.SlotChanged: (shared.refuse_slot, shared.change_slot),
    ev.SlotPoisoned: (shared.refuse_poison, shared.poison),
    ev.NodeChanged: (shared.refuse_node, shared.change_node),
    ev.PlanCommitted: (shared.refuse_plan, shared.commit),
    ev.PlanRefused: (_always, _nothing),
    ev.Offered: (shared.refuse_offer, shared.offer),
    ev.Acknowledged: (shared.refuse_ack, shared.acknowledge),
    ev.Overridden: (shared.refuse_override, shared.override),
    ev.GainRealised: (shared.refuse_gain, shared.add_gain),
    ev.ShareChecked: (_always, _nothing),
    ev.TrialQueued: (trials.refuse_known, trials.queue),
    ev.TrialAssigned: (trials.refuse_assignment, trials.assign),
    ev.TrialToldToStop: (trials.refuse_stop, trials.stop),
    ev.TrialRequeued: (trials.refuse_ended, trials.requeue),
    ev.TrialPaused: (trials.refuse_ended, trials.pause),
    ev.TrialEnded: (trials.refuse_end, trials.end),
    ev.TrialResized: (trials.refuse_ended, trials.resize),
    ev.TrialSuspected: (trials.refuse_ended, trials.suspect),
    ev.DialsDeclared: (trials.refuse_ended, trials.declare_dials),
    ev.ResumptionWanted: (trials.refuse_unknown, trials.want_on),
    RequestTaken: (_always, steering.take),
    sig.TokenSeen: (trials.refuse_unknown, trials.note_token),
    ev.TrialContinued: (trials.refuse_continuation, trials.go_on),
    ev.Reported: (trials.refuse_report, trials.report),
    ev.CommitPinned: (trials.refuse_pin, trials.pin),
    ev.ReportTold: (trials.refuse_unknown, trials.tell),
    fev.CommitDamaged: (trials.refuse_ended, faults.note_damage),
    fev.RankSilent: (trials.refuse_ended, faults.note_silence),
    fev.TrialRetried: (faults.refuse_retry, faults.retry),
    sig.ReportToldAgain: (trials.refuse_unknown, trials.tell),
    sig.ReportWanted: (trials.refuse_unknown, trials.want_report),
    sig.TrialReleased: (trials.refuse_unknown, trials.release),
    sig.RungOpened: (trials.refuse_rung, trials.open_rung),
    sig.SlotExpected: (_always, shared.expect_slot),
    sig.SlotToldToClose: (shared.refuse_closing, shared.close_when_idle),
    sig.SlotsGivenUp: (_always, shared.give_up_slots),
    sig.RecordsCame: (trials.refuse_unplaced, seen.fold_records),
    sig.TiersFound: (trials.refuse_unplaced, seen.note_tier_fits),
    sig.StepModeFound: (trials.refuse_unplaced, seen.note_mode),
    sig.FitAdvanced: (trials.refuse_unplaced, seen.advance_fit),
    sig.PaceSeen: (trials.refuse_unplaced, seen.note_pace),
    sig.MeasurementBegan: (trials.refuse_unplaced, seen.begin_measurement),
    sig.CheckMade: (trials.refuse_unplaced, seen.note_check),
    sig.TrialNoted: (trials.refuse_unplaced, faults.note),
}
"""For each event why it may be impossible, and what it changes. The first looks only, the second never fails."""

_OF_TELEMETRY = (sig.RecordsCame, sig.FitAdvanced, sig.CheckMade, sig.TrialNoted, ev.ShareChecked, ev.GainRealised)
"""Events that concern neither the order of a slot nor who waits for a report."""
_OF_GRANTS = (ev.Offered, ev.Acknowledged, ev.Overridden)
"""Events that concern the order of a slot alone."""


def refusal(world: World, event: Event) -> str | None:
    """Why an event cannot happen now; None where it can."""
    rule, run = _RULES.get(type(event)), world.runs.get(event.run_id)
    if rule is None:
        return f"no rule for {type(event).__name__}"
    if run is None and not isinstance(event, ev.RunBegan):
        return f"there is no run {event.run_id!r}"
    return None if run is None else rule[0](world, run, event)


def apply(world: World, event: Event) -> Applied | Refused:
    """Change the world by an event, or refuse it and change nothing."""
    reason = refusal(world, event)
    if reason is not None:
        return Refused(f"{type(event).__name__}: {reason}")
    if event.run_id not in world.runs:
        shared.add_run(world, event)
    run = world.runs[event.run_id]
    trial = run.trials.get(getattr(event, "trial_id", None))  # type: ignore[arg-type]
    before = None if trial is None else (trial.slot_id, trial.state)
    effects = _RULES[type(event)][1](world, run, event)
    if trial is None or before is None or isinstance(event, _OF_TELEMETRY):
        return Applied(world, effects)
    slots = dict.fromkeys(slot_id for slot_id in (before[0], trial.slot_id) if slot_id is not None)
    moved: tuple[Effect, ...] = (Decide(),) if before != (trial.slot_id, trial.state) else ()
    woken: tuple[Effect, ...] = () if isinstance(event, _OF_GRANTS) else (Wake(trial.trial_id),)
    return Applied(world, (*effects, *moved, *(Publish(slot_id) for slot_id in slots), *woken))
