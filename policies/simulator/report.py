"""What a simulation comes to: job completion times, makespan, goodput, device-hours, fairness, number of changes.

Pure arithmetic on jobs that have run. `summarise` is called by `policies.simulator.simulate`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.policies.simulator.cluster import Cluster
from orchestrator.policies.simulator.engine import Engine
from orchestrator.policies.simulator.job import Job
from orchestrator.policies.simulator.record import Calibration, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What became of one job.

    Attributes:
        name, application: which.
        submitted_s, began_s, ended_s: its times; None for what did not happen before the horizon.
        jct_s: from submission to end.
        waited_s: seconds without a device.
        device_s: device-seconds held.
        cost: what they cost.
        num_starts, num_changes, num_failures: begins on devices, dials turned live, times thrown back.
        fairness: completion time over that alone on an equal part of the cluster; 1 is fair, more is unfair to it.
        progress: part of its length that was done.
    """

    name: str
    application: str
    submitted_s: float
    began_s: float | None
    ended_s: float | None
    jct_s: float | None
    waited_s: float
    device_s: float
    cost: float
    num_starts: int
    num_changes: int
    num_failures: int
    fairness: float | None
    progress: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one simulation.

    Attributes:
        policy: who decided.
        num_jobs, num_ended: jobs submitted, and those that ended.
        jct_mean_s, jct_p50_s, jct_p99_s: completion times of those that ended.
        makespan_s: from the first submission to the last end.
        goodput: useful work done per second of the makespan, in devices that run each job alone with its best batch.
        utilisation: part of all device-seconds that was held.
        device_hours, cost: held by all jobs, and what they cost.
        fairness_mean, fairness_p99: of finish-time fairness; unfair_ratio is the part of jobs above 1.
        num_restarts: starts beyond the first, of all jobs. num_changes: dials turned live. num_failures: failures.
        num_decisions: decisions made.
        stopped: why it would not have ended, None where all jobs ended or the horizon came.
        jobs: one by one.
        spans, calibrations: as recorded.
    """

    policy: str
    num_jobs: int
    num_ended: int
    jct_mean_s: float | None
    jct_p50_s: float | None
    jct_p99_s: float | None
    makespan_s: float
    goodput: float
    utilisation: float
    device_hours: float
    cost: float
    fairness_mean: float | None
    fairness_p99: float | None
    unfair_ratio: float | None
    num_restarts: int
    num_changes: int
    num_failures: int
    num_decisions: int
    stopped: str | None
    jobs: tuple[JobResult, ...]
    spans: tuple[Span, ...] = ()
    calibrations: tuple[Calibration, ...] = ()

    def figures(self) -> dict[str, object]:
        """Everything but jobs, spans and calibrations, by name."""
        hidden = {"jobs", "spans", "calibrations"}
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in hidden}


def summarise(engine: Engine, policy: str) -> Summary:
    """The figures of an engine that has run."""
    jobs = sorted(engine.jobs.values(), key=lambda job: (job.submission.time_s, job.trial_id))
    crowd = _mean_crowd(jobs, engine.now_s)
    alone = _alone(engine.cluster)
    results = tuple(_result(job, engine.cluster, crowd, alone) for job in jobs)
    jcts = [result.jct_s for result in results if result.jct_s is not None]
    rhos = [result.fairness for result in results if result.fairness is not None]
    first_s = min((job.submission.time_s for job in jobs), default=0.0)
    last_s = max((result.ended_s or engine.now_s for result in results), default=first_s)
    makespan_s = last_s - first_s
    useful_s = sum(job.progress * job.submission.length * alone(job, 1.0) for job in jobs)
    held_s = sum(job.attained_s for job in jobs)
    return Summary(
        policy=policy,
        num_jobs=len(jobs),
        num_ended=len(jcts),
        jct_mean_s=float(np.mean(jcts)) if jcts else None,
        jct_p50_s=_quantile(jcts, 50),
        jct_p99_s=_quantile(jcts, 99),
        makespan_s=makespan_s,
        goodput=useful_s / makespan_s if makespan_s > 0 else 0.0,
        utilisation=held_s / (makespan_s * engine.cluster.num_devices) if makespan_s > 0 else 0.0,
        device_hours=held_s / 3600,
        cost=sum(job.cost for job in jobs),
        fairness_mean=float(np.mean(rhos)) if rhos else None,
        fairness_p99=_quantile(rhos, 99),
        unfair_ratio=sum(rho > 1 for rho in rhos) / len(rhos) if rhos else None,
        num_restarts=sum(max(0, job.num_starts - 1) for job in jobs),
        num_changes=sum(job.num_changes for job in jobs),
        num_failures=sum(job.num_failures for job in jobs),
        num_decisions=engine.guard.num_decisions,
        stopped=engine.stopped,
        jobs=results,
        spans=tuple(engine.timeline.spans),
        calibrations=tuple(engine.timeline.calibrations),
    )


def _result(
    job: Job, cluster: Cluster, crowd: Callable[[float, float], float], alone: Callable[[Job, float], float]
) -> JobResult:
    submitted_s = job.submission.time_s
    jct_s = None if job.ended_s is None else job.ended_s - submitted_s
    fairness = None
    if jct_s is not None and job.ended_s is not None and job.ended_s > submitted_s:
        fair = cluster.num_devices / max(1.0, crowd(submitted_s, job.ended_s))
        fairness = jct_s / (job.progress * job.submission.length * alone(job, fair))
    return JobResult(
        name=job.submission.name,
        application=job.application.name,
        submitted_s=submitted_s,
        began_s=job.began_s,
        ended_s=job.ended_s,
        jct_s=jct_s,
        waited_s=job.waited_s,
        device_s=job.attained_s,
        cost=job.cost,
        num_starts=job.num_starts,
        num_changes=job.num_changes,
        num_failures=job.num_failures,
        fairness=fairness,
        progress=job.progress,
    )


def _alone(cluster: Cluster) -> Callable[[Job, float], float]:
    """Seconds of a whole job alone on so many devices; remembered, because many jobs are alike."""
    known: dict[tuple[str, float], float] = {}

    def alone(job: Job, num_devices: float) -> float:
        rounded = round(num_devices) if num_devices >= 10 else round(num_devices, 2)
        key = (job.application.name, max(0.01, float(rounded)))
        if key not in known:
            known[key] = job.application.alone_s(key[1], cluster.devices_per_node, job.application.tiers[0])
        return known[key]

    return alone


def _mean_crowd(jobs: Sequence[Job], now_s: float) -> Callable[[float, float], float]:
    """The mean number of jobs that were in the cluster between two times."""
    steps: dict[float, int] = {}
    for job in jobs:
        steps[job.submission.time_s] = steps.get(job.submission.time_s, 0) + 1
        end_s = now_s if job.ended_s is None else job.ended_s
        steps[end_s] = steps.get(end_s, 0) - 1
    times = sorted(steps)
    areas, counts, area, count, before = [], [], 0.0, 0, times[0] if times else 0.0
    for time_s in times:
        area += count * (time_s - before)
        count += steps[time_s]
        areas.append(area)
        counts.append(count)
        before = time_s

    def area_until(time_s: float) -> float:
        index = bisect_right(times, time_s) - 1
        return areas[index] + counts[index] * (time_s - times[index])

    return lambda begin_s, end_s: (area_until(end_s) - area_until(begin_s)) / (end_s - begin_s)


def _quantile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
