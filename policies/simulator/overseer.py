"""Who decides how long a simulated job goes on, and whether more are submitted: nobody, or a search.

Asked by the engine at marks of a job's progress. A plain workload needs none: `Nobody`.
"""

from __future__ import annotations

from typing import Protocol

from orchestrator.policies.simulator.job import Job
from orchestrator.policies.simulator.workload import Submission, Workload


class Overseer(Protocol):
    """Who decides how long a job goes on: nobody (a plain workload), or a search."""

    def first_mark(self, submission: Submission) -> float:
        """Progress at which a new job first reports or ends, in (0, 1]."""
        ...

    def reached(self, job: Job, now_s: float) -> float | None:
        """A job reached its mark: the next one, or None to end it."""
        ...

    def pause_s(self, job: Job) -> float:
        """Seconds without steps that a report costs a job which goes on."""
        ...

    def outlook(self, job: Job) -> tuple[float | None, int | None, float | None]:
        """Survival, samples at the next rung, and loss of a job; None each where there is none."""
        ...

    def next_submissions(self, num_active: int, now_s: float) -> Workload:
        """Jobs to submit now, after an ending."""
        ...


class Nobody:
    """The overseer of a plain workload: jobs end at their `stops_at`."""

    def first_mark(self, submission: Submission) -> float:
        """Where it ends."""
        return submission.stops_at

    def reached(self, job: Job, now_s: float) -> float | None:  # noqa: ARG002 -- the protocol fixes the signature
        """It ends."""
        return None

    def pause_s(self, job: Job) -> float:  # noqa: ARG002
        """Nothing."""
        return 0.0

    def outlook(self, job: Job) -> tuple[float | None, int | None, float | None]:  # noqa: ARG002
        """Nothing."""
        return None, None, None

    def next_submissions(self, num_active: int, now_s: float) -> Workload:  # noqa: ARG002
        """None."""
        return ()
