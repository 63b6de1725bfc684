"""From the journal back to the state: what a restarted actor, or a resumed run, knows.

Entries are applied in order through the same state machines that made them. When only the actor died, worker groups and
their trials are still there and go on; when the whole run starts anew, running trials go back to the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from orchestrator.control.continuation import rebase
from orchestrator.control.lifecycle import Slot, SlotState, Trial, TrialState
from orchestrator.control.nodes import NodeState, apply
from orchestrator.control.orders import DialReport, Grant, Report, Resumption, SlotHello, StopMode
from orchestrator.control.resizing import refuse
from orchestrator.control.state import RunState
from orchestrator.policies.codec import plan_from, settings_from, snapshot_from
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Override
from orchestrator.policies.tier import Tier

Entry = dict[str, Any]


def recover(state: RunState, entries: Iterable[Entry]) -> None:
    """Apply all entries to a fresh state."""
    for entry in entries:
        action = _ACTIONS.get(entry["kind"])
        if action is not None:
            action(state, moved(entry, Path(state.spec.run_dir)))
    state.wants_decision = True


def moved(entry: Entry, run_dir: Path) -> Entry:
    """The entry with its checkpoint where it is now, if the run's directory was moved or copied since."""
    checkpoint = entry.get("checkpoint")
    if not checkpoint or Path(checkpoint).is_relative_to(run_dir):
        return entry
    _, has_trials, inside = checkpoint.rpartition("/trials/")
    return {**entry, "checkpoint": str(run_dir / "trials" / inside)} if has_trials else entry


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


def _recovered(state: RunState, entry: Entry) -> None:
    if entry["are_workers_gone"]:
        forget_workers(state)


def _stop(state: RunState, entry: Entry) -> None:
    trial_id = TrialId(entry["trial_id"])
    if entry.get("num_workers") is not None:
        state.lifecycle.trials[trial_id].moves_to = entry["num_workers"]
    state.lifecycle.stop(trial_id, StopMode(entry["mode"]))


def _queued(state: RunState, entry: Entry) -> None:
    state.lifecycle.submit(TrialId(entry["trial_id"]), entry["params"])


def _slot(state: RunState, entry: Entry) -> None:
    slot_id = entry["slot_id"]
    if entry["hello"] is not None:
        hello = _hello_from(entry["hello"])
        state.set_devices(hello.devices)
        slot = state.lifecycle.slots.get(slot_id)
        if slot is not None and slot.trial_id is not None:
            state.end_trial(slot.trial_id)
        state.lifecycle.attach(hello)
        state.lifecycle.slots[slot_id].epoch = entry["epoch"]
    elif entry["state"] == SlotState.LOST:
        slot = state.lifecycle.slots.get(slot_id)
        if slot is not None and slot.trial_id is not None:
            state.end_trial(slot.trial_id)
        state.lifecycle.lose_slot(slot_id, "lost")
    elif slot_id in state.lifecycle.slots:
        state.lifecycle.close_slot(slot_id)


def _assigned(state: RunState, entry: Entry) -> None:
    """The journal, not the queue's order, says which slot a trial went to."""
    trial = state.lifecycle.trials[TrialId(entry["trial_id"])]
    trial.attempt = entry["attempt"]
    slot = state.lifecycle.slots[entry["slot_id"]]
    state.lifecycle.place(trial, slot)
    state.begin_trial(trial, slot)


def _requeued(state: RunState, entry: Entry) -> None:
    trial = state.lifecycle.trials[TrialId(entry["trial_id"])]
    if trial.moves_to is not None and trial.trial_id in state.fits:
        state.kept_fits[trial.trial_id] = state.fits[trial.trial_id]
    _take_out(state, trial)
    state.lifecycle.put_back(trial, entry["attempt"])
    trial.num_workers, trial.moves_to = entry.get("num_workers"), None
    trial.onward = settings_from(entry["onward"]) if entry.get("onward") is not None else None
    trial.num_restarts = entry["num_restarts"]
    trial.checkpoint = entry["checkpoint"]
    trial.num_overflows = entry.get("num_overflows", 0)
    trial.resume = settings_from(entry["resume"]) if entry.get("resume") is not None else None


def _paused(state: RunState, entry: Entry) -> None:
    trial = state.lifecycle.trials[TrialId(entry["trial_id"])]
    _take_out(state, trial)
    trial.step, trial.num_samples, trial.checkpoint = entry["step"], entry["num_samples"], entry["checkpoint"]
    state.lifecycle.pause(trial)


def _continued(state: RunState, entry: Entry) -> None:
    trial = state.lifecycle.trials[TrialId(entry["trial_id"])]
    trial.params = entry["params"]
    if entry["origin"] is not None:
        names = ("num_reports", "checkpoint", "step", "num_samples")
        wanted = Resumption(token="", origin=TrialId(entry["origin"]), **{name: entry[name] for name in names})
        rebase(state.lifecycle, trial, wanted)
    state.lifecycle.go_on(trial)
    trial.attempt = entry["attempt"]


def _ended(state: RunState, entry: Entry) -> None:
    trial = state.lifecycle.trials[TrialId(entry["trial_id"])]
    _take_out(state, trial)
    state.lifecycle.remove_from_queue(trial.trial_id)
    trial.state, trial.reason = TrialState(entry["state"]), entry["reason"]
    trial.step, trial.num_samples = entry["step"], entry["num_samples"]


def _take_out(state: RunState, trial: Trial) -> None:
    """The trial is no longer in its slot."""
    if trial.slot_id is not None:
        slot = state.lifecycle.slots[trial.slot_id]
        slot.trial_id, slot.state = None, SlotState.IDLE
        trial.slot_id = None
        state.end_trial(trial.trial_id)


def _told(state: RunState, entry: Entry) -> None:
    state.telling.recovered(TrialId(entry["trial_id"]), entry["index"])


def _result(state: RunState, entry: Entry) -> None:
    trial = state.lifecycle.trials[TrialId(entry["trial_id"])]
    metrics = {key: float("nan") if value is None else value for key, value in entry["metrics"].items()}
    report = Report(
        index=entry["index"],
        step=entry["step"],
        num_samples=entry["num_samples"],
        metrics=metrics,
        checkpoint=entry["checkpoint"],
    )
    state.take_report(trial, report)


def _plan(state: RunState, entry: Entry) -> None:
    state.plan = plan_from(entry["plan"])
    state.wishes = state.plan.nodes or state.wishes
    snapshot = snapshot_from(entry["snapshot"])
    for view in snapshot.trials:
        state.shape_fits[view.shape] = view.fit
        if view.trial_id in state.lifecycle.trials:
            state.lifecycle.trials[view.trial_id].loss = view.loss
        if view.trial_id in state.fits:
            state.fits[view.trial_id] = view.fit
            state.step_modes[view.trial_id] = view.step_modes
    state.overrides.clear()
    state.ledger.commit(state.plan)
    state.committed_at_s[state.plan.generation] = entry["t_s"]


def _offer(state: RunState, entry: Entry) -> None:
    line = state.ledger.lines.get(TrialId(entry["trial_id"]))
    if line is None:
        return
    settings = settings_from(entry["settings"])
    units = tuple(tuple(ranks) for ranks in entry["units"])
    line.offers.append(Grant(generation=entry["generation"], settings=settings, units=units, amount=entry["amount"]))


def _ack(state: RunState, entry: Entry) -> None:
    trial_id = TrialId(entry["trial_id"])
    state.ledger.acknowledge(trial_id, entry["generation"])
    state.lifecycle.trials[trial_id].is_resized = False
    for dial in entry["dials"]:
        state.changes_applied[dial] = state.changes_applied.get(dial, 0) + 1
    if entry["dials"] and trial_id in state.changed_at_s:
        state.changed_at_s[trial_id] = entry["t_s"]


def _override(state: RunState, entry: Entry) -> None:
    trial_id = TrialId(entry["trial_id"])
    settings = settings_from(entry["settings"])
    if state.ledger.record_override(trial_id, entry["number"], settings, entry["generation"]):
        state.overrides[trial_id] = Override(
            number=entry["number"], generation=entry["generation"], settings=settings, reason=entry["reason"]
        )


def _dials(state: RunState, entry: Entry) -> None:
    limits = {**entry["limits"], "tiers": tuple(Tier(tier) for tier in entry["limits"]["tiers"])}
    state.lifecycle.trials[TrialId(entry["trial_id"])].allows = DialReport(
        step=entry["step"],
        start=settings_from(entry["start"]),
        limits=DialLimits(**limits),
        off=dict(entry["off"]),
    )


def _resize(state: RunState, entry: Entry) -> None:
    """What became of a wish for another number of ranks; the wish itself is in the plan in force."""
    state.restart_s = entry["restart_s"]
    if entry["stage"] == "given_up":
        refuse(state, state.lifecycle.trials[TrialId(entry["trial_id"])], entry["num_workers"])


def _node(state: RunState, entry: Entry) -> None:
    node_type = entry.get("node_type", "")
    apply(state, entry["node_id"], NodeState(entry["state"]), entry["num_cores"], node_type)


def _gain(state: RunState, entry: Entry) -> None:
    for dial in entry["dial"].split("+"):
        state.gains[dial].add(entry["realised"])


def _hello_from(values: dict[str, Any]) -> SlotHello:
    devices = tuple(DeviceView(**{**view, "kind": DeviceKind(view["kind"])}) for view in values["devices"])
    placement = tuple(DeviceId(device_id) for device_id in values["placement"])
    return SlotHello(
        **{
            **values,
            "devices": devices,
            "placement": placement,
            "pids": tuple(values["pids"]),
            "enforces": tuple(values.get("enforces", ())),
        }
    )


_ACTIONS: dict[str, Callable[[RunState, Entry], None]] = {
    "trial_queued": _queued,
    "slot": _slot,
    "trial_assigned": _assigned,
    "trial_requeued": _requeued,
    "trial_paused": _paused,
    "trial_continued": _continued,
    "trial_ended": _ended,
    "result": _result,
    "told": _told,
    "plan": _plan,
    "offer": _offer,
    "ack": _ack,
    "dials": _dials,
    "override": _override,
    "gain": _gain,
    "trial_stop": _stop,
    "trial_resize": _resize,
    "node": _node,
    "recovered": _recovered,
}
