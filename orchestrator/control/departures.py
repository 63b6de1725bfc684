"""What becomes of a trial that leaves its slot, is told to, or whose slot dies: the event that says so. Pure.

A trial whose slot died goes back to the front of the queue and resumes from its last commit, a bounded number of times;
so does one that ran out of memory, and once a function that raised in a cheaper tier. Called by the controller, which
writes the events, and by `transition` for journals that say of a slot only that it was lost.
"""

from __future__ import annotations

from orchestrator.control.events import Event, TrialEnded, TrialPaused, TrialRequeued, TrialToldToStop
from orchestrator.control.fault_events import TrialRetried
from orchestrator.control.orders import Cause, Outcome, Retry, Status, StopMode
from orchestrator.control.world import Run, Slot, Trial, TrialState
from orchestrator.policies.plan import Settings, can_split, on_ranks

MAX_OVERFLOWS = 3
"""Times that a trial may run out of memory between two reports before it is failed."""

_FINAL = {Status.DONE: TrialState.DONE, Status.STOPPED: TrialState.STOPPED, Status.FAILED: TrialState.FAILED}


def told_to_stop(run: Run, trial: Trial, mode: StopMode) -> list[Event]:
    """A trial shall leave its slot, or wait no more; nothing where it ended or was told so already."""
    if trial.state.is_final or trial.stop is mode:
        return []
    stop = TrialToldToStop(run_id=run.spec.run_id, trial_id=trial.trial_id, mode=mode.value)
    if mode is StopMode.DISCARD and trial.state is not TrialState.RUNNING:
        return [stop, _ended(trial, TrialState.STOPPED, "stopped while it was waiting")]
    return [stop]


def failed(trial: Trial, reason: str) -> Event:
    """A trial that waits will never run."""
    return _ended(trial, TrialState.FAILED, reason, cause=Cause.NO_SLOT)


def retried(run: Run, retry: Retry) -> list[Event]:
    """Trials that had failed and go on when the run does."""
    if retry is Retry.NONE:
        return []
    return [
        TrialRetried(
            run_id=run.spec.run_id,
            trial_id=trial.trial_id,
            attempt=trial.attempt + 1,
            # No whole commit is left of one that failed for damage: what is newer than its beginning is lost.
            checkpoint=None if trial.cause is Cause.DAMAGE else trial.checkpoint,
            reason=trial.reason,
        )
        for trial in run.trials.values()
        if trial.state is TrialState.FAILED and (retry is Retry.ALL or trial.cause is not Cause.OWN)
    ]


def left(run: Run, trial: Trial, outcome: Outcome) -> Event:
    """A trial left its slot on all ranks, as they agreed."""
    if outcome.status in _BEGINS_AGAIN:
        return _BEGINS_AGAIN[outcome.status](trial, outcome)
    if outcome.status is not Status.INTERRUPTED:
        return _ended_or_again(run, trial, outcome)
    if trial.stop is StopMode.PAUSE:
        return _paused(trial, outcome)
    if trial.stop is StopMode.DISCARD:  # said while it was leaving for another reason
        return _ended(trial, TrialState.STOPPED, "stopped while it was leaving its slot", outcome)
    what = "gave its devices back" if trial.stop is StopMode.MOVE else "interrupted"
    reason = f"{what} at step {outcome.step}"
    if trial.stop is StopMode.RESIZE and trial.moves_to is not None:
        reason = f"goes on with {trial.moves_to} ranks"
        return _requeued(
            trial,
            reason,
            outcome,
            num_workers=trial.moves_to,
            resume=None,
            onward=_onward(run, trial, trial.moves_to),
        )
    return _requeued(trial, reason, outcome)


def _ended_or_again(run: Run, trial: Trial, outcome: Outcome) -> Event:
    """A trial ended; one that met a full disk by itself begins again, as often as slots may die under it."""
    num_restarts = trial.num_restarts + 1
    if outcome.cause is Cause.DISK and trial.stop is StopMode.NONE and num_restarts <= run.spec.restart_budget:
        return _requeued(trial, f"the disk: {outcome.reason}", None, num_restarts=num_restarts)
    return _ended(trial, _FINAL[outcome.status], outcome.reason, outcome, cause=outcome.cause)


def lost(run: Run, slot: Slot, trial: Trial, reason: str, *, is_charged: bool = True) -> Event:
    """The slot of a trial died; the trial fails when it used up its restarts."""
    if slot.poison is not None:
        if slot.poison.status in _BEGINS_AGAIN:
            return _BEGINS_AGAIN[slot.poison.status](trial, slot.poison)
        return _ended(trial, TrialState.FAILED, slot.poison.reason, cause=slot.poison.cause)
    num_restarts, budget = trial.num_restarts + is_charged, run.spec.restart_budget
    if trial.stop is StopMode.DISCARD:
        return _ended(trial, TrialState.STOPPED, "stopped while its slot was lost")
    if num_restarts > budget:
        text = f"its slot died {num_restarts} times under it; allowed: {budget} restarts (slots.restart_budget)"
        cause = Cause.DEVICE if trial.is_suspect else Cause.PROCESS
        return _ended(trial, TrialState.FAILED, text, cause=cause)
    if trial.stop is StopMode.PAUSE:
        return _paused(trial, None)
    return _requeued(trial, f"{slot.slot_id} lost: {reason}", None, num_restarts=num_restarts)


def _onward(run: Run, trial: Trial, num_workers: int) -> Settings | None:
    """The dials with which a trial goes on with other ranks: those it has, split anew."""
    running = None if trial.account is None else trial.account.settings
    running = running or run.spec.start_on(trial.size)
    if not can_split(running, num_workers):  # an override may have come since the plan
        return trial.onward
    return on_ranks(running, num_workers, run.spec.limits.max_micro_batch)


def _overflowed(trial: Trial, outcome: Outcome) -> Event:
    """A trial ran out of memory: back to the queue with the dials it asks for, a bounded number of times."""
    number = trial.num_overflows + 1
    if trial.stop is StopMode.DISCARD:
        return _ended(trial, TrialState.STOPPED, "stopped while it ran out of memory", outcome)
    if number >= MAX_OVERFLOWS:
        text = f"ran out of memory {number} times since its last report; allowed: {MAX_OVERFLOWS - 1}; lower"
        text = f"{text} dials.batch.max_micro; the last time: {outcome.reason}"
        return _ended(trial, TrialState.FAILED, text, outcome, cause=Cause.MEMORY)
    reason = f"out of memory at step {outcome.step}: {outcome.reason}"
    resume = outcome.settings or trial.resume
    return _requeued(trial, reason, outcome, num_overflows=number, resume=resume, onward=None)


def _raised_in_tier(trial: Trial, outcome: Outcome) -> Event:
    """A function raised in a cheaper tier: back to the queue without its precision dial; where that is off, failed."""
    if trial.stop is StopMode.DISCARD:
        return _ended(trial, TrialState.STOPPED, "stopped while it left a cheaper tier", outcome)
    if trial.precision_off:
        return _ended(trial, TrialState.FAILED, outcome.reason, outcome)
    reason = f"{outcome.reason}; begins again in its start tier"
    return _requeued(trial, reason, outcome, precision_off=outcome.reason)


_BEGINS_AGAIN = {Status.MEMORY: _overflowed, Status.TIER: _raised_in_tier}
"""After these a trial begins again from its last commit."""


def _requeued(trial: Trial, reason: str, outcome: Outcome | None, **changes: object) -> TrialRequeued:
    checkpoint = trial.checkpoint if outcome is None else outcome.checkpoint or trial.checkpoint
    fields: dict[str, object] = {
        "num_restarts": trial.num_restarts,
        "num_overflows": trial.num_overflows,
        "resume": trial.resume,
        "onward": trial.onward,
        "num_workers": trial.num_workers,
        "precision_off": trial.precision_off,
        **_progress(trial, outcome),
        **changes,
    }
    return TrialRequeued(
        run_id=trial.run_id,
        trial_id=trial.trial_id,
        attempt=trial.attempt + 1,
        checkpoint=checkpoint,
        reason=reason,
        **fields,  # type: ignore[arg-type]
    )


def _paused(trial: Trial, outcome: Outcome | None) -> TrialPaused:
    progress = _progress(trial, outcome)
    checkpoint = trial.checkpoint if outcome is None else outcome.checkpoint or trial.checkpoint
    return TrialPaused(
        run_id=trial.run_id,
        trial_id=trial.trial_id,
        attempt=trial.attempt + (outcome is None),
        reason=f"paused at step {progress['step']}",
        checkpoint=checkpoint,
        **progress,
    )


def paused_in_queue(trial: Trial) -> TrialPaused:
    """The search puts a trial aside that waits for a slot."""
    return TrialPaused(
        run_id=trial.run_id,
        trial_id=trial.trial_id,
        attempt=trial.attempt,
        reason=f"paused at step {trial.step}",
        checkpoint=trial.checkpoint,
        step=trial.step,
        num_samples=trial.num_samples,
    )


def _ended(
    trial: Trial, state: TrialState, reason: str, outcome: Outcome | None = None, *, cause: Cause = Cause.OWN
) -> TrialEnded:
    return TrialEnded(
        run_id=trial.run_id,
        trial_id=trial.trial_id,
        state=state.value,
        reason=reason,
        cause=cause.value,
        **_progress(trial, outcome),
    )


def _progress(trial: Trial, outcome: Outcome | None) -> dict[str, int]:
    if outcome is None:
        return {"step": trial.step, "num_samples": trial.num_samples}
    return {"step": max(trial.step, outcome.step), "num_samples": max(trial.num_samples, outcome.num_samples)}
