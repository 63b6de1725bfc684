"""From the journal back to the state: what a restarted actor, or a resumed run, knows.

Entries are applied in order through the same state machines that made them. When only the actor died, worker groups and
their trials are still there and go on; when the whole run starts anew, running trials go back to the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.control.continuation import rebase
from orchestrator.control.events import (
    Acknowledged,
    DialsDeclared,
    Event,
    GainRealised,
    NodeChanged,
    Offered,
    Overridden,
    PlanCommitted,
    Recovered,
    Reported,
    ReportTold,
    SlotChanged,
    TrialAssigned,
    TrialContinued,
    TrialEnded,
    TrialPaused,
    TrialQueued,
    TrialRequeued,
    TrialResized,
    TrialToldToStop,
)
from orchestrator.control.lifecycle import Slot, SlotState, Trial, TrialState
from orchestrator.control.nodes import NodeState, apply
from orchestrator.control.orders import DialReport, Grant, Resumption, StopMode
from orchestrator.control.resizing import refuse
from orchestrator.control.state import RunState
from orchestrator.policies.snapshot import Override


def recover(state: RunState, entries: Iterable[Event]) -> None:
    """Apply all entries to a fresh state."""
    for entry in entries:
        action = _ACTIONS.get(type(entry))
        if action is not None:
            action(state, moved(entry, Path(state.spec.run_dir)))
    state.wants_decision = True


def moved(entry: Event, run_dir: Path) -> Event:
    """The entry with its checkpoint where it is now, if the run's directory was moved or copied since."""
    checkpoint = getattr(entry, "checkpoint", None)
    if not checkpoint or Path(checkpoint).is_relative_to(run_dir):
        return entry
    _, has_trials, inside = checkpoint.rpartition("/trials/")
    return replace(entry, checkpoint=str(run_dir / "trials" / inside)) if has_trials else entry  # type: ignore[call-arg]


def forget_workers(state: RunState) -> None:
    """All worker groups ended with an earlier start of the run: their trials go back to the queue, at no charge."""
    for trial in state.lifecycle.trials.values():
        trial.num_restarts = 0
        if trial.stop.commits:
            trial.stop = StopMode.NONE
        trial.num_workers, trial.moves_to = None, None  # groups of other sizes open only when a policy asks anew
    for slot in state.lifecycle.slots.values():
        _forget_slot(state, slot)


def _forget_slot(state: RunState, slot: Slot) -> None:
    """The slot's processes ended with the earlier start of the run; that is no fault of its trial."""
    if slot.trial_id is not None:
        state.end_trial(slot.trial_id)
    state.lifecycle.lose_slot(slot.slot_id, "the run was started anew")
    slot.state = SlotState.CLOSED


def _recovered(state: RunState, entry: Recovered) -> None:
    if entry.are_workers_gone:
        forget_workers(state)


def _stop(state: RunState, entry: TrialToldToStop) -> None:
    trial_id = entry.trial_id
    if entry.num_workers is not None:
        state.lifecycle.trials[trial_id].moves_to = entry.num_workers
    state.lifecycle.stop(trial_id, StopMode(entry.mode))


def _queued(state: RunState, entry: TrialQueued) -> None:
    state.lifecycle.submit(entry.trial_id, dict(entry.params))


def _slot(state: RunState, entry: SlotChanged) -> None:
    slot_id = entry.slot_id
    if entry.hello is not None:
        hello = entry.hello
        state.set_devices(hello.devices)
        slot = state.lifecycle.slots.get(slot_id)
        if slot is not None and slot.trial_id is not None:
            state.end_trial(slot.trial_id)
        state.lifecycle.attach(hello)
        state.lifecycle.slots[slot_id].epoch = entry.epoch
    elif entry.state == SlotState.LOST:
        slot = state.lifecycle.slots.get(slot_id)
        if slot is not None and slot.trial_id is not None:
            state.end_trial(slot.trial_id)
        state.lifecycle.lose_slot(slot_id, "lost")
    elif slot_id in state.lifecycle.slots:
        state.lifecycle.close_slot(slot_id)


def _assigned(state: RunState, entry: TrialAssigned) -> None:
    """The journal, not the queue's order, says which slot a trial went to."""
    trial = state.lifecycle.trials[entry.trial_id]
    trial.attempt = entry.attempt
    slot = state.lifecycle.slots[entry.slot_id]
    state.lifecycle.place(trial, slot)
    state.begin_trial(trial, slot)


def _requeued(state: RunState, entry: TrialRequeued) -> None:
    trial = state.lifecycle.trials[entry.trial_id]
    if trial.moves_to is not None and trial.trial_id in state.fits:
        state.kept_fits[trial.trial_id] = state.fits[trial.trial_id]
    _take_out(state, trial)
    state.lifecycle.put_back(trial, entry.attempt)
    trial.num_workers, trial.moves_to = entry.num_workers, None
    trial.onward = entry.onward
    trial.num_restarts = entry.num_restarts
    trial.checkpoint = entry.checkpoint
    trial.num_overflows = entry.num_overflows
    trial.resume = entry.resume


def _paused(state: RunState, entry: TrialPaused) -> None:
    trial = state.lifecycle.trials[entry.trial_id]
    _take_out(state, trial)
    trial.step, trial.num_samples, trial.checkpoint = entry.step, entry.num_samples, entry.checkpoint
    state.lifecycle.pause(trial)


def _continued(state: RunState, entry: TrialContinued) -> None:
    trial = state.lifecycle.trials[entry.trial_id]
    trial.params = dict(entry.params)
    if entry.origin is not None:
        names = ("num_reports", "checkpoint", "step", "num_samples")
        wanted = Resumption(token="", origin=entry.origin, **{name: getattr(entry, name) for name in names})
        rebase(state.lifecycle, trial, wanted)
    state.lifecycle.go_on(trial)
    trial.attempt = entry.attempt


def _ended(state: RunState, entry: TrialEnded) -> None:
    trial = state.lifecycle.trials[entry.trial_id]
    _take_out(state, trial)
    state.lifecycle.remove_from_queue(trial.trial_id)
    trial.state, trial.reason = TrialState(entry.state), entry.reason
    trial.step, trial.num_samples = entry.step, entry.num_samples


def _take_out(state: RunState, trial: Trial) -> None:
    """The trial is no longer in its slot."""
    if trial.slot_id is not None:
        slot = state.lifecycle.slots[trial.slot_id]
        slot.trial_id, slot.state = None, SlotState.IDLE
        trial.slot_id = None
        state.end_trial(trial.trial_id)


def _told(state: RunState, entry: ReportTold) -> None:
    state.telling.recovered(entry.trial_id, entry.index)


def _result(state: RunState, entry: Reported) -> None:
    state.take_report(state.lifecycle.trials[entry.trial_id], entry.report)


def _plan(state: RunState, entry: PlanCommitted) -> None:
    snapshot, state.plan = entry.decode()
    state.wishes = state.plan.nodes or state.wishes
    for view in snapshot.trials:
        state.shape_fits[view.shape] = view.fit
        if view.trial_id in state.lifecycle.trials:
            state.lifecycle.trials[view.trial_id].loss = view.loss
        if view.trial_id in state.fits:
            state.fits[view.trial_id] = view.fit
            state.step_modes[view.trial_id] = view.step_modes
    state.overrides.clear()
    state.ledger.commit(state.plan)
    state.committed_at_s[state.plan.generation] = entry.t_s


def _offer(state: RunState, entry: Offered) -> None:
    line = state.ledger.lines.get(entry.trial_id)
    if line is None:
        return
    settings = entry.settings
    line.offers.append(Grant(generation=entry.generation, settings=settings, units=entry.units, amount=entry.amount))


def _ack(state: RunState, entry: Acknowledged) -> None:
    trial_id = entry.trial_id
    state.ledger.acknowledge(trial_id, entry.generation)
    state.lifecycle.trials[trial_id].is_resized = False
    for dial in entry.dials:
        state.changes_applied[dial] = state.changes_applied.get(dial, 0) + 1
    if entry.dials and trial_id in state.changed_at_s:
        state.changed_at_s[trial_id] = entry.t_s


def _override(state: RunState, entry: Overridden) -> None:
    trial_id, settings = entry.trial_id, entry.settings
    if state.ledger.record_override(trial_id, entry.number, settings, entry.generation):
        state.overrides[trial_id] = Override(
            number=entry.number, generation=entry.generation, settings=settings, reason=entry.reason
        )


def _dials(state: RunState, entry: DialsDeclared) -> None:
    state.lifecycle.trials[entry.trial_id].allows = DialReport(
        step=entry.step, start=entry.start, limits=entry.limits, off=dict(entry.off)
    )


def _resize(state: RunState, entry: TrialResized) -> None:
    """What became of a wish for another number of ranks; the wish itself is in the plan in force."""
    state.restart_s = entry.restart_s
    if entry.stage == "given_up":
        refuse(state, state.lifecycle.trials[entry.trial_id], entry.num_workers)


def _node(state: RunState, entry: NodeChanged) -> None:
    apply(state, entry.node_id, NodeState(entry.state), entry.num_cores, entry.node_type)


def _gain(state: RunState, entry: GainRealised) -> None:
    for dial in entry.dial.split("+"):
        state.gains[dial].add(entry.realised)


_ACTIONS: dict[type[Event], Callable[[RunState, Any], None]] = {
    TrialQueued: _queued,
    SlotChanged: _slot,
    TrialAssigned: _assigned,
    TrialRequeued: _requeued,
    TrialPaused: _paused,
    TrialContinued: _continued,
    TrialEnded: _ended,
    Reported: _result,
    ReportTold: _told,
    PlanCommitted: _plan,
    Offered: _offer,
    Acknowledged: _ack,
    DialsDeclared: _dials,
    Overridden: _override,
    GainRealised: _gain,
    TrialToldToStop: _stop,
    TrialResized: _resize,
    NodeChanged: _node,
    Recovered: _recovered,
}
