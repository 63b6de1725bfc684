"""Trials that the search puts aside and takes up again: pause, go on, go on with the state of another trial.

What Ray Tune calls pausing, resuming and exploiting. A paused trial has committed and is in no slot; its stand-in holds
a pointer to the state behind a report, which is kept until newer ones of the same trial replace it. No Ray.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.control.events import TrialContinued, TrialPaused, TrialQueued, TrialRequeued
from orchestrator.control.lifecycle import Lifecycle, Trial, TrialState
from orchestrator.control.orders import Report, Resumption, StopMode
from orchestrator.control.state import RunState
from orchestrator.policies.plan import TrialId

logger = logging.getLogger(__name__)

KEPT_PINS = 4
"""Pinned states kept of each trial. Population based training copies the newest, at most one change of mind ago."""


class Continuations:
    """The part of the controller that knows how trials go on."""

    def __init__(self, state: RunState, stop: Callable[[TrialId, StopMode], None]) -> None:
        self._state, self._stop = state, stop
        self._why_no_slots = ""
        self.is_interrupted = False

    def give_up(self, reason: str) -> None:
        """No slot will ever open: trials that wait for one, now or later, fail with that reason."""
        self._why_no_slots = reason
        for trial_id in self._state.lifecycle.queue:
            self._state.log_ended(self._state.lifecycle.fail(trial_id, reason))

    def submit(self, trial_id: TrialId, params: dict[str, Any], wanted: Resumption | None) -> None:
        """Queue a new trial; let a known one go on. A resend (the same token) changes nothing.

        Raises:
            ValueError: a new trial shall go on from a commit of another run.
        """
        self._submit(trial_id, params, wanted)
        if self._why_no_slots:
            self.give_up(self._why_no_slots)

    def _submit(self, trial_id: TrialId, params: dict[str, Any], wanted: Resumption | None) -> None:
        lifecycle = self._state.lifecycle
        if trial_id not in lifecycle.trials and wanted is not None and wanted.num_reports:
            raise ValueError(
                f"{trial_id} shall go on from {wanted.checkpoint}, but this run has no such trial; restore the search"
                " together with its run: trainable(run_file, resume=True)"
            )
        trial = lifecycle.submit(trial_id, params)
        if trial is not None:
            trial.token = "" if wanted is None else wanted.token
            self._state.log(TrialQueued(trial_id=trial_id, params=trial.params))
            self._state.journal.sync()
            return
        trial = lifecycle.trials[trial_id]
        wanted = wanted or Resumption(token=trial.token or "the only one")
        if wanted.token == trial.token and trial.state is not TrialState.PAUSED:
            return
        trial.token = wanted.token
        if trial.state is not TrialState.RUNNING:
            self._go_on(trial, params, wanted)
        elif trial.stop is not StopMode.NONE or is_of_another(trial, wanted):
            trial.next = (params, wanted)  # once it has left its slot
            self.pause(trial_id)

    def pause(self, trial_id: TrialId) -> None:
        """Put a trial aside; one that ended or is about to is left alone, and all are when the run is interrupted."""
        trial = self._state.lifecycle.trials.get(trial_id)
        if trial is None or self.is_interrupted:
            return
        if trial.state is TrialState.QUEUED:
            self._state.lifecycle.pause(trial)
            self.log_paused(trial)
            self._state.changed_trials.add(trial_id)
        elif trial.state is TrialState.RUNNING and trial.stop in {StopMode.NONE, StopMode.RESIZE}:
            self._stop(trial_id, StopMode.PAUSE)

    def settled(self, trial: Trial) -> None:
        """The trial has left its slot: what the search asked for in the meantime can happen now."""
        if trial.next is not None and trial.state is not TrialState.RUNNING:
            (params, wanted), trial.next = trial.next, None
            self._go_on(trial, params, wanted)

    def end_paused(self) -> None:
        """The search is over: what it put aside will not go on."""
        for trial in list(self._state.lifecycle.trials.values()):
            if trial.state is TrialState.PAUSED:
                self._stop(trial.trial_id, StopMode.DISCARD)

    def log_paused(self, trial: Trial) -> None:
        """Journal that a trial waits for the search."""
        self._state.log(
            TrialPaused(
                trial_id=trial.trial_id,
                attempt=trial.attempt,
                reason=trial.story[-1],
                checkpoint=trial.checkpoint,
                step=trial.step,
                num_samples=trial.num_samples,
            )
        )
        self._state.journal.sync()

    def pin(self, trial_id: TrialId, num_reports: int) -> dict[str, Any]:
        """Keep the state behind report `num_reports` of a trial; fields of a `Resumption`.

        Raises:
            ValueError: the trial has not reported so often, or that commit is gone.
        """
        trial = self._state.lifecycle.trials.get(trial_id)
        if trial is None or num_reports == 0:
            return {"origin": trial_id, "num_reports": 0, "checkpoint": None, "step": 0, "num_samples": 0}
        if num_reports > len(trial.reports):
            raise ValueError(f"{trial_id} has reported {len(trial.reports)} times, not {num_reports} times")
        report = trial.reports[num_reports - 1]
        directory = Path(self._state.spec.run_dir) / "trials" / trial_id / "pinned"
        if not report.checkpoint:
            raise ValueError(f"report {num_reports} of {trial_id} is known by its number only")
        kept = _keep(Path(report.checkpoint), directory, f"{trial.attempt}-{num_reports}")
        trial.reports[num_reports - 1] = replace(report, checkpoint=str(kept))
        return {
            "origin": trial_id,
            "num_reports": num_reports,
            "checkpoint": str(kept),
            "step": report.step,
            "num_samples": report.num_samples,
        }

    def _go_on(self, trial: Trial, params: dict[str, Any], wanted: Resumption) -> None:
        state = self._state
        is_other = is_of_another(trial, wanted)
        ended = {TrialState.STOPPED, TrialState.FAILED}
        if not is_other and (
            trial.state in {TrialState.DONE, TrialState.QUEUED} or (trial.state in ended and not wanted.reopens)
        ):
            return
        trial.params = params
        if is_other:
            rebase(state.lifecycle, trial, wanted)
            # Commits of the course that is given up could be taken for those of the new one: same step, same cursor.
            shutil.rmtree(Path(state.spec.run_dir) / "trials" / trial.trial_id / "checkpoints", ignore_errors=True)
        state.lifecycle.go_on(trial)
        state.log(
            TrialContinued(
                trial_id=trial.trial_id,
                attempt=trial.attempt,
                params=params,
                origin=wanted.origin if is_other else None,
                num_reports=wanted.num_reports if is_other else len(trial.reports),
                checkpoint=trial.checkpoint,
                step=trial.step,
                num_samples=trial.num_samples,
            )
        )
        state.journal.sync()
        state.changed_trials.add(trial.trial_id)


def is_of_another(trial: Trial, wanted: Resumption) -> bool:
    """Whether the state to go on with is not the trial's own newest, however much newer that is."""
    if wanted.origin is None:
        return False
    return wanted.origin != trial.trial_id or wanted.num_reports > len(trial.reports)


def requeued(trial: Trial) -> TrialRequeued:
    """The entry of a trial that is back in the queue."""
    return TrialRequeued(
        trial_id=trial.trial_id,
        attempt=trial.attempt,
        num_restarts=trial.num_restarts,
        checkpoint=trial.checkpoint,
        reason=trial.story[-1],
        num_overflows=trial.num_overflows,
        resume=trial.resume,
        num_workers=trial.num_workers,
        onward=trial.onward,
    )


def rebase(lifecycle: Lifecycle, trial: Trial, wanted: Resumption) -> None:
    """Give a trial the past of another one: its reports so far, its commit, its step."""
    origin = lifecycle.trials.get(wanted.origin or trial.trial_id)
    reports = [] if origin is None else list(origin.reports[: wanted.num_reports])
    for index in range(len(reports), wanted.num_reports):  # its own past has been replaced since
        reports.append(Report(index=index, step=wanted.step, num_samples=wanted.num_samples, metrics={}, checkpoint=""))
    if reports:
        reports[-1] = replace(reports[-1], checkpoint=wanted.checkpoint)
    trial.reports, trial.credit, trial.checkpoint = reports, len(reports), wanted.checkpoint
    trial.step, trial.num_samples = wanted.step, wanted.num_samples
    trial.story.append(f"takes up {wanted.origin} behind its report {wanted.num_reports}")


def _keep(commit: Path, directory: Path, name: str) -> Path:
    """Hard links of a commit's files under a name of their own, so that pruning does not reach them.

    Raises:
        ValueError: there is no such commit any more.
    """
    if directory in commit.parents:
        return commit
    kept = directory / name / commit.name
    if kept.exists():
        return kept
    if not commit.is_dir():
        raise ValueError(f"commit {commit} is gone; it can be kept only before the next two are made")
    draft = directory / f".{uuid.uuid4().hex[:12]}"
    shutil.copytree(commit, draft / commit.name, copy_function=os.link)
    draft.rename(directory / name)
    pins = sorted((path for path in directory.iterdir() if path.name[0] != "."), key=lambda path: path.stat().st_mtime)
    for old in pins[:-KEPT_PINS]:
        shutil.rmtree(old, ignore_errors=True)
    return kept
