"""What a slot is told, made from the state: to run its trial so and so, or to be idle, or to close.

Changes nothing; the controller publishes what comes of it.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.control.lifecycle import Slot, Trial
from orchestrator.control.memory import granted_bytes
from orchestrator.control.orders import SlotOp, SlotOrder, TrialOrder
from orchestrator.control.state import RunState


def order_of(state: RunState, slot: Slot) -> SlotOrder:
    """The newest order of a slot, numbered after its last one."""
    if slot.trial_id is None:
        return state.idle_order(slot)
    trial = state.lifecycle.trials[slot.trial_id]
    line = state.ledger.lines[trial.trial_id]
    return SlotOrder(
        incarnation=state.incarnation,
        seq=state.next_seq(slot),
        op=SlotOp.RUN,
        trial=_trial_order(state, trial),
        grant=line.offers[-1] if line.offers else line.applied,
        credit=trial.credit,
        stop=trial.stop,
    )


def _trial_order(state: RunState, trial: Trial) -> TrialOrder:
    spec = state.spec
    return TrialOrder(
        trial_id=trial.trial_id,
        attempt=trial.attempt,
        seed=spec.seed,
        job=spec.job,
        params=trial.params,
        start=spec.start_on(trial.size),
        limits=spec.limits,
        samples_per_report=spec.samples_per_report,
        max_reports=spec.max_reports,
        directory=str(Path(spec.run_dir) / "trials" / trial.trial_id),
        resume_from=trial.checkpoint,
        num_reports_done=len(trial.reports),
        memory_bytes=granted_bytes(state, state.ledger.lines[trial.trial_id].placement),
        probe_budget=spec.probe_budget,
        exchange_follows_tier=spec.exchange_follows_tier,
        metric=spec.metric,
        mode=spec.mode,
        import_paths=spec.import_paths,
    )
