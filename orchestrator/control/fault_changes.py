"""What events of faults change, and why one may be impossible. Only `transition.apply` calls these."""

from __future__ import annotations

from orchestrator.control import fault_events as fev
from orchestrator.control import signals as sig
from orchestrator.control.effects import Effect
from orchestrator.control.orders import Cause, StopMode
from orchestrator.control.trial_changes import tell_story
from orchestrator.control.world import Run, TrialState, World

Effects = tuple[Effect, ...]


def refuse_retry(_world: World, run: Run, event: fev.TrialRetried) -> str | None:
    """The trial is unknown, or has not failed."""
    trial = run.trials.get(event.trial_id)
    is_failed = trial is not None and trial.state is TrialState.FAILED
    return None if is_failed else f"{event.trial_id} has not failed"


def retry(_world: World, run: Run, event: fev.TrialRetried) -> Effects:
    """Queue a trial that had failed, behind those that wait, with all its restarts."""
    trial = run.trials[event.trial_id]
    trial.state, trial.stop, trial.attempt = TrialState.QUEUED, StopMode.NONE, event.attempt
    trial.reason, trial.cause, trial.checkpoint = "", Cause.OWN, event.checkpoint
    trial.num_restarts = trial.num_overflows = 0
    trial.queued_at_s = event.t_s
    run.queue.append(trial.trial_id)
    tell_story(trial, f"tried again; it had failed: {event.reason}")
    return ()


def note_damage(_world: World, run: Run, event: fev.CommitDamaged) -> Effects:
    """The trial has come less far than was thought."""
    trial = run.trials[event.trial_id]
    trial.step = min(trial.step, event.step)
    trial.notes["damage"] = (
        f"went on from step {event.step}: {event.num_steps} later steps were in a damaged checkpoint"
    )
    tell_story(trial, f"{event.checkpoint} is damaged; {trial.notes['damage']}")
    return ()


def note(_world: World, run: Run, event: sig.TrialNoted) -> Effects:
    """What is amiss with a trial is shown as long as it is."""
    trial, found = run.trials[event.trial_id], event.note
    trial.notes.pop(found.kind, None)
    if found.text:
        trial.notes[found.kind] = found.text
    return ()


def note_silence(_world: World, run: Run, event: fev.RankSilent) -> Effects:
    """Nothing changes but what is told; that the group has ended is an event of its own."""
    then = "its worker group is opened again" if event.is_restarted else "it is left alone"
    text = f"rank {event.rank} silent for {event.silent_s:.0f} s ({event.doing}; its process {event.process}); {then}"
    tell_story(run.trials[event.trial_id], text)
    return ()
