"""A run played again as a simulation: its trials, slots and measured speeds under its own policy, or under another.

From journal and telemetry: how long a step takes (the fit of `policies` to every window of the run), how noisy
gradients are, what starting, evaluating and checkpointing cost, and where the search ended each trial. What the search
decided is taken as it was; another policy would have brought it other reports. Called by the benchmark of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.control.events import PlanCommitted, Reported, TrialAssigned, TrialEnded
from orchestrator.control.journal import History, read_history, segments
from orchestrator.errors import JournalError
from orchestrator.policies import (
    Observation,
    Policy,
    Snapshot,
    TrialFit,
    TrialView,
    pool,
    predict_step_s,
    update,
)
from orchestrator.policies.plan import Settings, TrialId
from orchestrator.policies.simulator import (
    Application,
    Applications,
    Cluster,
    Job,
    Load,
    Nobody,
    Node,
    NoiseCurve,
    Rules,
    Submission,
    Summary,
    Workload,
    simulate,
)
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import num_steps_of
from orchestrator.telemetry.store import read_table
from orchestrator.telemetry.tables import TableKind

_WINDOW_STEPS = 20
_DEFAULT_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a run was, as far as a simulation needs it.

    Attributes:
        run_id: the run.
        makespan_s: from the first trial's assignment to the last one's end.
        views: each trial as the policy saw it first.
        fits: the speeds of each shape.
        noise: the noise scale of each trial, in samples.
        num_samples: samples that each trial consumed before its end.
        reports: reports of each trial.
        order: trials in the order in which slots took them.
        num_slots: trials at a time.
        start_s: mean seconds from assignment to the first step.
        pause_s: mean seconds without steps around a report.
        period_s: seconds between two decisions.
        world: a snapshot of the run, for its devices.
    """

    run_id: str
    makespan_s: float
    views: Mapping[TrialId, TrialView]
    fits: Mapping[str, TrialFit]
    noise: Mapping[TrialId, float]
    num_samples: Mapping[TrialId, int]
    reports: Mapping[TrialId, int]
    order: tuple[TrialId, ...]
    num_slots: int
    start_s: float
    pause_s: float
    period_s: float
    world: Snapshot


def course_of(run_dir: Path) -> Course:
    """Read the course of a run that has ended.

    Raises:
        ConfigError: the directory is no run.
        JournalError: it has no decision, no ended trial or no telemetry to make a simulation of.
    """
    history = read_history(run_dir)
    snapshots = [entry.decode()[0] for entry in history.of(PlanCommitted)]
    ended = {entry.trial_id: entry for entry in history.of(TrialEnded) if entry.num_samples > 0}
    assigned: dict[TrialId, float] = {}
    for entry in history.of(TrialAssigned):
        assigned.setdefault(entry.trial_id, entry.t_s)
    steps = read_table(run_dir / "telemetry", TableKind.STEPS).table.to_pandas()
    steps = steps[steps["rank"] == 0]
    views: dict[TrialId, TrialView] = {}
    for snapshot in snapshots:
        for view in snapshot.trials:
            views.setdefault(view.trial_id, view)
    order = tuple(sorted((t for t in views if t in ended and t in assigned), key=lambda t: (assigned[t], t)))
    if not order or steps.empty:
        raise JournalError(f"{run_dir} has no trial that ended, or no telemetry: there is no course to simulate")
    reports = {trial: 0 for trial in order}
    for report in history.of(Reported):
        if report.trial_id in reports:
            reports[report.trial_id] += 1
    start_s, pause_s = _idle(steps, order, assigned, {t: ended[t].t_s for t in order}, reports)
    return Course(
        run_id=run_dir.name,
        makespan_s=max(ended[t].t_s for t in order) - min(assigned[t] for t in order),
        views={trial: views[trial] for trial in order},
        fits=_fits(steps, views),
        noise={trial: _noise(steps[steps["trial_id"] == trial]) for trial in order},
        num_samples={trial: ended[trial].num_samples for trial in order},
        reports=reports,
        order=order,
        num_slots=_num_slots(history),
        start_s=start_s,
        pause_s=pause_s,
        period_s=_period_s(run_dir),
        world=snapshots[-1],
    )


def play(course: Course, policy: Policy, name: str) -> Summary:
    """Simulate the course under a policy.

    Raises:
        PolicyFaultError: the policy raised, returned an illegal plan or did not return.
    """
    applications: dict[str, Application] = {trial: _application(course, trial) for trial in course.order}
    devices = course.world.devices
    cluster = Cluster(
        nodes=tuple(
            Node(node_id=node, num_devices=len(mine), devices=mine)
            for node in sorted({device.node_id for device in devices})
            for mine in (tuple(device for device in devices if device.node_id == node),)
        )
    )
    rules = Rules(
        interval_s=course.period_s,
        decides_on_events=True,
        restart_s=course.start_s,
        window_s=max(1.0, course.period_s),
        seed=course.world.seed,
        units=devices[0].units,
    )
    overseer = _Slots(course)
    return simulate(
        policy,
        overseer.next_submissions(0, 0.0),
        cluster,
        name=name,
        applications=applications,
        rules=rules,
        overseer=overseer,
        make=lambda submission, known: _job(course, submission, known),
    )


class _Slots(Nobody):
    """Submits the next trial when a slot is free, and pauses at reports."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._num_submitted = 0
        self._reported: dict[TrialId, int] = {}

    def first_mark(self, submission: Submission) -> float:
        return 1.0 / max(1, self._course.reports[TrialId(submission.name)])

    def reached(self, job: Job, now_s: float) -> float | None:  # noqa: ARG002 -- the protocol fixes the signature
        total = max(1, self._course.reports[job.trial_id])
        done = self._reported[job.trial_id] = self._reported.get(job.trial_id, 0) + 1
        return None if done >= total else (done + 1) / total

    def pause_s(self, job: Job) -> float:  # noqa: ARG002
        return self._course.pause_s

    def next_submissions(self, num_active: int, now_s: float) -> Workload:
        first = self._num_submitted
        count = max(0, min(self._course.num_slots - num_active, len(self._course.order) - first))
        self._num_submitted += count
        return tuple(
            Submission(name=trial, time_s=now_s, application=trial, num_replicas=1, batch_size=1)
            for trial in self._course.order[first : first + count]
        )


def _job(course: Course, submission: Submission, applications: Applications) -> Job:
    view = course.views[TrialId(submission.name)]
    return Job(
        submission=submission,
        application=applications[submission.application],
        trial_id=view.trial_id,
        start=view.start,
        requested=view.start,
        limits=view.limits,
        placement=view.placement,
    )


@dataclass(frozen=True, slots=True)
class _Fitted:
    """The speeds of a shape as they were fitted; a tier that nobody measured is as fast as one that was."""

    fit: TrialFit
    units: int
    start: Settings

    def step_s(self, load: Load) -> float:
        """Seconds per optimizer step."""
        for tier in (load.tier, self.start.tier, *(cell.tier for cell in self.fit.cells)):
            found = predict_step_s(
                self.fit,
                cores=load.share * self.units,
                micro_batch=load.micro_batch,
                grad_accum=load.grad_accum,
                tier=tier,
                num_workers=load.num_workers,
            )
            if found is not None:
                return found.step_s
        raise JournalError(f"no speed was measured with {load.num_workers} ranks, nothing can be simulated from it")


def _application(course: Course, trial: TrialId) -> Application:
    view = course.views[trial]
    limits = view.limits
    return Application(
        name=view.shape,
        base_batch=view.start.global_batch,
        max_batch=limits.max_global_batch,
        min_micro_batch=1,
        max_micro_batch=limits.max_micro_batch,
        max_workers=len(view.placement),
        num_samples=float(course.num_samples[trial]),
        noise=NoiseCurve(ends=(1.0,), scales=(course.noise[trial],)),
        response=_Fitted(course.fits[view.shape], course.world.devices[0].units, view.start),
        requests=((1, view.start.global_batch),),
        tiers=limits.tiers,
        min_share=limits.min_share,
        counts_samples=True,
    )


def _fits(steps: Any, views: Mapping[TrialId, TrialView]) -> dict[str, TrialFit]:  # noqa: ANN401 -- a data frame
    """Fit every window of equal settings of every trial; trials of one shape together."""
    keys = ["share", "cores", "micro_batch", "grad_accum", "num_workers", "tier"]
    fits: dict[str, list[TrialFit]] = {}
    for trial, mine in steps.groupby("trial_id", observed=True):
        if trial not in views:
            continue
        changes = (mine[keys].astype(str) != mine[keys].astype(str).shift()).any(axis=1).cumsum()
        fit = TrialFit()
        for _, run in mine.groupby(changes):
            for begin in range(1, len(run), _WINDOW_STEPS):  # the first step after a change also pays for it
                window = run.iloc[begin : begin + _WINDOW_STEPS]
                first = window.iloc[0]
                num_steps = num_steps_of(window)
                seen = Observation(
                    cores=float(first["cores"]),
                    tier=Tier(str(first["tier"])),
                    micro_batch=int(first["micro_batch"]),
                    grad_accum=int(first["grad_accum"]),
                    num_workers=int(first["num_workers"]),
                    num_steps=int(num_steps.sum()),
                    step_s=float((window["step_s"] / num_steps).mean()),
                )
                fit = update(fit, [seen])
        fits.setdefault(views[trial].shape, []).append(fit)
    return {shape: pool(found) for shape, found in fits.items()}


def _noise(mine: Any) -> float:  # noqa: ANN401 -- a data frame
    """The noise scale of one trial over its whole course, 1 where it was never estimated."""
    known = mine[np.isfinite(mine["noise_trace"]) & np.isfinite(mine["grad_sq"])]
    if known.empty or known["noise_trace"].mean() <= 0:
        return 1.0
    return float(min(2.0**20, max(1.0, known["noise_trace"].mean() / max(1e-12, known["grad_sq"].mean()))))


def _idle(
    steps: Any,  # noqa: ANN401 -- a data frame
    order: tuple[TrialId, ...],
    assigned: Mapping[TrialId, float],
    ended: Mapping[TrialId, float],
    reports: Mapping[TrialId, int],
) -> tuple[float, float]:
    """Mean seconds from assignment to the first step, and those without steps around each report."""
    starts, idle_s, num_reports = [], 0.0, 0
    for trial in order:
        mine = steps[steps["trial_id"] == trial]
        start_s = max(0.0, float(mine["start_s"].min()) - assigned[trial])
        starts.append(start_s)
        idle_s += max(0.0, ended[trial] - assigned[trial] - start_s - float(mine["step_s"].sum()))
        num_reports += max(1, reports[trial])
    # The last report of a trial is followed by its end and not by a pause, so its cost goes to the start.
    pause_s = idle_s / num_reports
    return float(np.mean(starts)) + pause_s, pause_s


def _num_slots(history: History) -> int:
    return max(1, len({entry.slot_id for entry in history.of(TrialAssigned)}))


def _period_s(run_dir: Path) -> float:
    with segments(run_dir)[0].open(encoding="utf-8") as lines:
        head = json.loads(next(lines, "{}"))
    return float((head.get("spec") or {}).get("period_s") or _DEFAULT_PERIOD_S)
