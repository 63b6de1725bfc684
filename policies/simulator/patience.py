"""Whether a simulation will end, judged while it goes on: what to say where it will not.

Counts decisions since anything last began, ended or changed its node. Knows no policy. Asked by the engine after each
decision.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.policies.simulator.job import Job

NUM_IDLE = 200
"""Decisions after which jobs without a device, with nothing else to come, are taken to wait for ever.

A policy is a pure function of its snapshot; between two such decisions only the clock differs, and the longest patience
of a policy here, its cooldown, is a few intervals.
"""
MAX_INTERVALS = 1_000_000
"""Decisions until the next ending, or since the last one, that nobody waits for: 15 minutes of computing and more."""
_NUM_PROGRESS = 10_000
_MAX_NAMED = 3


@dataclass(slots=True)
class Patience:
    """One simulation's.

    Attributes:
        interval_s: seconds between two decisions.
        horizon_s: when the simulation stops at the latest; one that is near enough needs no judgement.
        num_idle: decisions since anything happened.
        best: the most progress that all jobs together had at the last look; failures take some of it away.
    """

    interval_s: float
    horizon_s: float = math.inf
    num_idle: int = 0
    best: float = 0.0

    def renew(self) -> None:
        """A job began or ended, or a node changed."""
        self.num_idle, self.best = 0, 0.0

    def look(self, now_s: float, active: Collection[Job], next_s: float | None) -> str | None:
        """Why the simulation would not end, None while it may.

        Args:
            now_s: the simulated time.
            active: the jobs that have not ended.
            next_s: when the next thing happens apart from decisions and failures; None if nothing will.
        """
        self.num_idle += 1
        if not now_s + self.interval_s > now_s:
            return (
                f"at {now_s:g} s a number cannot tell times {self.interval_s:g} s apart; allowed: times in seconds from"
                " the beginning of the workload"
            )
        if self.num_idle % NUM_IDLE or (self.horizon_s - now_s) / self.interval_s <= MAX_INTERVALS:
            return None
        running = [job for job in active if job.is_running]
        if not running and next_s is None:
            return (
                f"nothing has a device after {self.num_idle} decisions, and nothing else is to come: the policy places"
                f" none of {len(active)} jobs, {_named(active)}; give the cluster room for them (--cluster), or change"
                " what they ask for"
            )
        num_intervals = math.inf if next_s is None else (next_s - now_s) / self.interval_s
        if num_intervals > MAX_INTERVALS or self.num_idle >= MAX_INTERVALS:
            return (
                f"no job ends within {MAX_INTERVALS:,} decisions: {_named(running or active)}; allowed: shorter jobs, a"
                " longer --interval, or a --horizon"
            )
        return self._without_progress(running or active)

    def _without_progress(self, jobs: Collection[Job]) -> str | None:
        """Why jobs that have devices come no further, None where they do."""
        if self.num_idle % _NUM_PROGRESS:
            return None
        before, self.best = self.best, max(self.best, sum(job.progress for job in jobs))
        if self.best > before:
            return None
        return (
            f"no job comes further in {_NUM_PROGRESS:,} decisions: {_named(jobs)}; they are moved or fail before they"
            " reach a checkpoint"
        )


def _named(jobs: Collection[Job]) -> str:
    """The first jobs and what they asked for."""
    ordered = sorted(jobs, key=lambda job: (job.submission.time_s, job.trial_id))
    words = [
        f"{job.submission.name} (num_replicas {job.submission.num_replicas}, batch_size {job.submission.batch_size})"
        for job in ordered[:_MAX_NAMED]
    ]
    return ", ".join(words) + (f" and {len(ordered) - _MAX_NAMED} more" if len(ordered) > _MAX_NAMED else "")
