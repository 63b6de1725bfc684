"""What happened in a simulation, for pictures and checks: who held what from when to when, and what was promised.

Plain lists; knows neither engine nor plots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.policies.plan import DeviceId, Plan, TrialId
from orchestrator.policies.simulator.job import Job

MAX_CALIBRATIONS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What one job held during [begin_s, end_s)."""

    name: str
    application: str
    placement: tuple[DeviceId, ...]
    share: float
    global_batch: int
    tier: str
    begin_s: float = 0.0
    end_s: float = 0.0

    def is_like(self, other: Span) -> bool:
        """Whether both hold the same."""
        mine = (self.placement, self.share, self.global_batch, self.tier)
        return mine == (other.placement, other.share, other.global_batch, other.tier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Goodput that a plan predicted for a trial, and what it came to be until the next decision, in samples/s."""

    time_s: float
    name: str
    predicted: float
    realised: float


@dataclass(slots=True)
class _Promise:
    time_s: float
    predicted: float
    progress: float


@dataclass(slots=True)
class Timeline:
    """Spans and calibrations, as they come."""

    spans: list[Span] = field(default_factory=list)
    calibrations: list[Calibration] = field(default_factory=list)
    _open: dict[str, Span] = field(default_factory=dict)
    _promises: dict[TrialId, _Promise] = field(default_factory=dict)

    def note(self, now_s: float, span: Span) -> None:
        """A job holds something from now on."""
        before = self._open.get(span.name)
        if before is not None and before.is_like(span):
            return
        self._end(now_s, span.name)
        if span.placement:
            self._open[span.name] = replace(span, begin_s=now_s)

    def expect(self, now_s: float, plan: Plan, jobs: Mapping[TrialId, Job]) -> None:
        """A plan promises; what the last one promised is settled for jobs that ran undisturbed since."""
        promises = {}
        for row in plan.allocations:
            job = jobs[row.trial_id]
            done = job.progress * job.length
            promise = self._promises.get(row.trial_id)
            if promise is not None:
                self._settle(promise, job, now_s, done)
            if row.predicted_goodput is not None and row.settings.share > 0:
                promises[row.trial_id] = _Promise(now_s, row.predicted_goodput, done)
        self._promises = promises

    def close(self, now_s: float) -> None:
        """The simulation is over."""
        for name in list(self._open):
            self._end(now_s, name)

    def _settle(self, promise: _Promise, job: Job, now_s: float, done: float) -> None:
        seconds = now_s - max(promise.time_s, job.ready_s)
        if not job.is_running or seconds <= 0 or len(self.calibrations) >= MAX_CALIBRATIONS:
            return
        self.calibrations.append(
            Calibration(
                time_s=promise.time_s,
                name=job.submission.name,
                predicted=promise.predicted,
                realised=(done - promise.progress) / seconds,
            )
        )

    def _end(self, now_s: float, name: str) -> None:
        span = self._open.pop(name, None)
        if span is not None and now_s > span.begin_s:
            self.spans.append(replace(span, end_s=now_s))
