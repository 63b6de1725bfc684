"""Trials that the search puts aside and takes up again: pause, go on, go on with the state of another trial.

What Ray Tune calls pausing, resuming and exploiting. A paused trial has committed and is in no slot; its stand-in holds
a pointer to the state behind a report, which is kept until newer ones of the same trial replace it. Pure, apart from
`keep_commit`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from orchestrator.control.departures import paused_in_queue, told_to_stop
from orchestrator.control.events import Event, ResumptionWanted, TrialContinued, TrialQueued
from orchestrator.control.orders import Resumption, StopMode
from orchestrator.control.signals import TokenSeen
from orchestrator.control.world import Run, Trial, TrialState
from orchestrator.errors import JournalError
from orchestrator.policies.plan import TrialId
from orchestrator.room import has_room, is_full, words

KEPT_PINS = 4
"""Pinned states kept of each trial. Population based training copies the newest, at most one change of mind ago."""

_PAUSABLE = {StopMode.NONE, StopMode.RESIZE, StopMode.MOVE}


def submitted(run: Run, trial_id: TrialId, params: dict[str, Any], wanted: Resumption | None) -> list[Event]:
    """The search wants a trial to run: a new one, or a known one. A resend (the same token) changes nothing.

    Raises:
        ValueError: a new trial shall go on from a commit of another run.
    """
    trial = run.trials.get(trial_id)
    if trial is None:
        if wanted is not None and wanted.num_reports:
            raise ValueError(
                f"{trial_id} shall go on from {wanted.checkpoint}, but this run has no such trial; restore the search"
                " together with its run: trainable(run_file, resume=True)"
            )
        return [TrialQueued(trial_id=trial_id, params=params, token="" if wanted is None else wanted.token)]
    wanted = wanted or Resumption(token=trial.token or "the only one")
    if wanted.token == trial.token and trial.state is not TrialState.PAUSED:
        return []
    if trial.is_held:  # somebody paused it: the search's wish is kept until they resume it
        return [ResumptionWanted(trial_id=trial_id, params=params, resumption=wanted)]
    if trial.state is not TrialState.RUNNING:
        return _continued(run, trial, params, wanted) or [TokenSeen(trial_id=trial_id, token=wanted.token)]
    if trial.stop is StopMode.NONE and not trial.is_given_up_for(wanted):
        return [TokenSeen(trial_id=trial_id, token=wanted.token)]
    later = ResumptionWanted(trial_id=trial_id, params=params, resumption=wanted)
    return [later, *paused(run, trial_id)]


def paused(run: Run, trial_id: TrialId) -> list[Event]:
    """Put a trial aside; one that ended or is about to is left alone, and all are when the run is interrupted."""
    trial = run.trials.get(trial_id)
    if trial is None or run.is_interrupted:
        return []
    if trial.state is TrialState.QUEUED:
        return [paused_in_queue(trial)]
    if trial.state is TrialState.RUNNING and trial.stop in _PAUSABLE:
        return told_to_stop(run, trial, StopMode.PAUSE)
    return []


def next_continuation(run: Run) -> list[Event]:
    """The next trial that has left its slot and that the search asked to go on in the meantime."""
    for trial in run.trials.values():
        if trial.next is not None and trial.state is not TrialState.RUNNING and not trial.is_held:
            found = _continued(run, trial, *trial.next)
            if found:
                return found
    return []


def next_end_of_paused(run: Run) -> list[Event]:
    """The search is over: the next trial that it put aside and that will not go on."""
    for trial in run.trials.values():
        if trial.state is TrialState.PAUSED:
            return told_to_stop(run, trial, StopMode.DISCARD)
    return []


def pinned_path(run: Run, trial: Trial, num_reports: int) -> Path:
    """Keep the commit behind report `num_reports` of a trial; where it is kept.

    Raises:
        ValueError: the trial has not reported so often, or that commit is gone.
    """
    if num_reports > len(trial.reports):
        raise ValueError(f"{trial.trial_id} has reported {len(trial.reports)} times, not {num_reports} times")
    report = trial.reports[num_reports - 1]
    if not report.checkpoint:
        raise ValueError(f"report {num_reports} of {trial.trial_id} is known by its number only")
    directory = Path(run.spec.run_dir) / "trials" / trial.trial_id / "pinned"
    return keep_commit(Path(report.checkpoint), directory, f"{trial.attempt}-{num_reports}")


def keep_commit(commit: Path, directory: Path, name: str) -> Path:
    """Hard links of a commit's files under a name of their own, so that pruning does not reach them.

    The commit before it is kept beside it: that is what a trial goes on from where this one turns out damaged.

    Raises:
        ValueError: there is no such commit any more.
        JournalError: the disk is full; whoever asked asks again.
    """
    if directory in commit.parents:
        return commit
    kept = directory / name / commit.name
    if kept.exists():
        return kept
    if not commit.is_dir():
        raise ValueError(f"commit {commit} is gone; it can be kept only before the next two are made")
    draft = directory / f".{uuid.uuid4().hex[:12]}"
    try:
        for each in (commit, *_before(commit)):
            shutil.copytree(each, draft / each.name, copy_function=os.link)
        draft.rename(directory / name)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(draft, ignore_errors=True)
        if is_full(error) or not has_room(commit.parent):
            raise JournalError(f"{commit} cannot be kept: {words(directory)}") from error
        raise
    pins = sorted((path for path in directory.iterdir() if path.name[0] != "."), key=lambda path: path.stat().st_mtime)
    for old in pins[:-KEPT_PINS]:
        shutil.rmtree(old, ignore_errors=True)
    return kept


def _before(commit: Path) -> list[Path]:
    """The newest commit that is older, in the same directory; none where there is none."""
    steps = {int(path.name[5:]): path for path in commit.parent.glob("step-*") if path.name[5:].isdigit()}
    own = int(commit.name[5:]) if commit.name[5:].isdigit() else 0
    return [steps[step] for step in sorted(steps) if step < own][-1:]


def _continued(run: Run, trial: Trial, params: dict[str, Any], wanted: Resumption) -> list[Event]:
    """A trial that is in no slot goes on; nothing where it waits already, or has ended and may not be reopened."""
    is_other = trial.is_given_up_for(wanted)
    if not is_other and trial.state in {TrialState.DONE, TrialState.QUEUED}:
        return []
    if not is_other and trial.state.is_final and not wanted.reopens:
        return []
    return [
        TrialContinued(
            run_id=run.spec.run_id,
            trial_id=trial.trial_id,
            attempt=trial.attempt + 1,
            params=params,
            origin=wanted.origin if is_other else None,
            num_reports=wanted.num_reports if is_other else len(trial.reports),
            checkpoint=wanted.checkpoint if is_other else trial.checkpoint,
            step=wanted.step if is_other else trial.step,
            num_samples=wanted.num_samples if is_other else trial.num_samples,
            token=wanted.token,
        )
    ]
