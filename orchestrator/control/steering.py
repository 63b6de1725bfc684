"""What people and programs ask of a run that goes on: add, clone, stop, pause, resume, set. From requests to events.

A trial that was added or cloned has no stand-in in the search: its token is that of its request, nobody judges it, and
it trains to its end. One that is paused commits and stays out of every slot until it is resumed, whatever the search
says. Pure, apart from `keep_commit`; `take` is applied by `transition`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.control import moves
from orchestrator.control.departures import paused_in_queue, told_to_stop
from orchestrator.control.effects import Decide, Effect
from orchestrator.control.events import Event, ResumptionWanted, TrialContinued, TrialQueued
from orchestrator.control.orders import Resumption, StopMode
from orchestrator.control.requested import RequestTaken
from orchestrator.control.resumption import keep_commit
from orchestrator.control.world import CLONED, REQUESTED, Run, Trial, TrialState, World
from orchestrator.errors import RequestError
from orchestrator.policies.plan import TrialId
from orchestrator.requests import Request


def events_of(run: Run, request: Request) -> list[Event]:
    """What a request comes to; nothing where it was done before.

    Raises:
        RequestError: it cannot be done.
    """
    if request.request_id in run.requests:
        return []
    if run.is_interrupted:
        raise RequestError("the run is being stopped; allowed: a run that goes on", "run_stopping")
    if request.command == "add":
        return _added(run, request)
    if request.command == "set" and not request.trial_id:
        return [_taken(request, "")]
    trial = run.trials.get(TrialId(request.trial_id))
    if trial is None:
        known = ", ".join(run.trials) or "none yet"
        raise RequestError(f"there is no trial {request.trial_id!r}; allowed: {known}", "no_trial")
    if request.command == "clone":
        return _cloned(run, trial, request)
    if request.command == "resume":
        return [*_resumed(trial, request), _taken(request, trial.trial_id)]
    if trial.state.is_final and not (request.command == "stop" and trial.state is TrialState.STOPPED):
        raise RequestError(f"{trial.trial_id} has ended ({trial.state.value})", "trial_ended")
    if request.command == "pause" and run.spec.is_function and not (trial.reports and trial.reports[-1].checkpoint):
        text = f"{trial.trial_id} is a function that has reported no checkpoint, so it would begin anew"
        raise RequestError(f"{text}; allowed: wait for its first checkpoint, or stop it", "no_commit")
    stops = told_to_stop(run, trial, StopMode.DISCARD) if request.command == "stop" else []
    return [*stops, _taken(request, trial.trial_id)]


def answer_of(run: Run, request: Request) -> dict[str, Any]:
    """What whoever asked is told, once it was done."""
    trial_id = run.requests.get(request.request_id, request.trial_id)
    return {"command": request.command, **({"trial_id": trial_id} if trial_id else {})}


def next_pause(run: Run) -> list[Event]:
    """The next trial that somebody paused and that has not left for it yet."""
    for trial in run.trials.values():
        if not trial.is_held or run.is_interrupted:
            continue
        if trial.state is TrialState.QUEUED:
            return [paused_in_queue(trial)]
        stays = trial.stop in {StopMode.NONE, StopMode.RESIZE, StopMode.MOVE}
        if trial.state is TrialState.RUNNING and stays and moves.stands_at_commit(run, trial):
            return told_to_stop(run, trial, StopMode.PAUSE)
    return []


def take(_world: World, run: Run, event: RequestTaken) -> tuple[Effect, ...]:
    """What a request changes by itself: terms, and whether a trial is held; applied by `transition`."""
    run.requests[event.request_id] = event.trial_id
    trial = run.trials.get(event.trial_id)
    if event.command == "set" and trial is None:
        run.terms = run.terms.changed(event.values)
    elif event.command == "set" and trial is not None:
        trial.own_terms |= dict(event.values)
    if trial is not None:
        trial.is_held = event.command == "pause" or (trial.is_held and event.command not in {"resume", "stop"})
        shown = "".join(f" {name}={value}" for name, value in event.values.items())
        trial.story.append(f"{event.by} asked for: {event.command}{shown}")
    return (Decide(),)


def _taken(request: Request, trial_id: str) -> RequestTaken:
    return RequestTaken(
        request_id=request.request_id,
        by=request.by,
        command=request.command,
        trial_id=TrialId(trial_id),
        values=dict(request.values),
    )


def _added(run: Run, request: Request) -> list[Event]:
    token = f"{REQUESTED}{request.request_id}"
    known = _with_token(run, token)
    if known is not None:  # the actor died before it had written down all of it
        return [_taken(request, known.trial_id)]
    trial_id = _new_id(run)
    return [_queued(run, trial_id, request.values, token), _taken(request, trial_id)]


def _queued(run: Run, trial_id: TrialId, params: Mapping[str, Any], token: str) -> TrialQueued:
    fixed = {name: value for name, value in run.spec.params.items() if name not in params}
    return TrialQueued(trial_id=trial_id, params={**params, **fixed}, token=token)


def _cloned(run: Run, trial: Trial, request: Request) -> list[Event]:
    """A new trial behind the newest report of another, with other parameters."""
    token = f"{CLONED}{request.request_id}"
    known = _with_token(run, token)
    if known is not None and known.attempt:
        return [_taken(request, known.trial_id)]
    number, trial_id = len(trial.reports), _new_id(run) if known is None else known.trial_id
    report = trial.reports[-1] if trial.reports else None
    if report is None or not report.checkpoint:
        raise RequestError(f"{trial.trial_id} has no report with a commit to go on from", "no_commit")
    if number >= run.spec.max_reports:
        text = f"{trial.trial_id} has made all its {number} reports, so nothing would be left to train"
        raise RequestError(f"{text}; allowed: a trial that is not complete", "trial_ended")
    directory = Path(run.spec.run_dir) / "trials" / trial_id / "pinned"
    try:
        kept = keep_commit(Path(report.checkpoint), directory, f"{trial.trial_id}-{number}")
    except (ValueError, OSError) as error:
        raise RequestError(f"{trial.trial_id} cannot be cloned: {error}", "no_commit") from None
    begun = TrialContinued(
        trial_id=trial_id,
        attempt=1,
        params={**trial.params, **request.values},
        origin=trial.trial_id,
        num_reports=number,
        checkpoint=str(kept),
        step=report.step,
        num_samples=report.num_samples,
        token=token,
    )
    made = [] if known is not None else [_queued(run, trial_id, begun.params, token)]
    return [*made, begun, _taken(request, trial_id)]


def _resumed(trial: Trial, request: Request) -> list[Event]:
    """A trial goes on that was paused by somebody, was stopped, or failed; it is then nobody's but theirs."""
    is_back = trial.token == f"{REQUESTED}{request.request_id}" or (trial.is_held and trial.state is TrialState.QUEUED)
    if is_back:  # the actor died before it had written down all of it
        return []
    if trial.is_held and trial.state is TrialState.RUNNING:  # it has not left yet
        own = Resumption(token=trial.token)
        return [ResumptionWanted(trial_id=trial.trial_id, params=trial.params, resumption=own)]
    is_over = trial.state in {TrialState.STOPPED, TrialState.FAILED}
    if not is_over and not (trial.is_held and trial.state is TrialState.PAUSED):
        allowed = "allowed: a trial that somebody paused or stopped, or that failed"
        raise RequestError(f"{trial.trial_id} is {trial.state.value}; {allowed}", "not_paused")
    return [
        TrialContinued(
            trial_id=trial.trial_id,
            attempt=trial.attempt + 1,
            params=trial.params,
            origin=None,
            num_reports=len(trial.reports),
            checkpoint=trial.checkpoint,
            step=trial.step,
            num_samples=trial.num_samples,
            token=f"{REQUESTED}{request.request_id}" if is_over else trial.token,
        )
    ]


def _with_token(run: Run, token: str) -> Trial | None:
    return next((trial for trial in run.trials.values() if trial.token == token), None)


def _new_id(run: Run) -> TrialId:
    number = sum(trial_id.startswith("added-") for trial_id in run.trials)
    return TrialId(f"added-{number:05d}")
