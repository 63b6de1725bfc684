"""A hyper-parameter search in simulation: asynchronous successive halving, with loss curves drawn by seed.

An overseer of the engine: trials are submitted as others end, report at rungs, and the worse ones are stopped. It also
says what a policy with the `search` objective wants to know: how likely a trial is to survive its next rung.
"""

from __future__ import annotations

import random
from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.policies.learn.survival import bounded, chance_after_rung, rungs
from orchestrator.policies.simulator.job import Job
from orchestrator.policies.simulator.workload import Submission, Workload


def stops(recorded: Sequence[float], loss: float, reduction_factor: int) -> bool:
    """Whether asynchronous successive halving stops a trial at a rung, where these losses were judged before it.

    As Ray Tune's does: the first one passes, and then whoever is not worse than the quantile of those before.
    """
    return bool(recorded) and loss > float(np.percentile(recorded, 100 / reduction_factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """A search.

    Attributes:
        application: what every trial trains.
        num_trials: how many are tried.
        max_concurrent: trials at a time; the others are submitted as these end.
        max_reports: reports of a trial that is never stopped.
        grace_reports: reports before the first rung.
        reduction_factor: one in so many survives a rung.
        seed: of the loss curves.
        num_replicas, batch_size: what each trial asks for.
        pause_s: seconds that a report costs a trial.
    """

    application: str
    num_trials: int = 64
    max_concurrent: int = 8
    max_reports: int = 16
    grace_reports: int = 1
    reduction_factor: int = 4
    seed: int = 0
    num_replicas: int = 1
    batch_size: int = 64
    pause_s: float = 0.0

    @property
    def rungs(self) -> tuple[int, ...]:
        """Reports at which trials are compared, the last report excluded."""
        return rungs(self.grace_reports, self.reduction_factor, self.max_reports)


@dataclass(slots=True)
class AshaSearch:
    """The search as it goes on. Source of the rule: Li et al., ASHA (MLSys 2020), in the stopping form of Ray Tune.

    Attributes:
        spec: what is searched.
        losses: the loss that each trial reported last.
        stopped_at: the report at which a trial was stopped.
        best: the trial with the lowest loss of those that were never stopped.
    """

    spec: SearchSpec
    losses: dict[str, float] = field(default_factory=dict)
    stopped_at: dict[str, int] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    _num_submitted: int = 0
    _recorded: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    _ranks: dict[str, tuple[int, float]] = field(default_factory=dict)

    def first_submissions(self) -> Workload:
        """The trials to begin with."""
        return self.next_submissions(0, 0.0)

    @property
    def best(self) -> str | None:
        """The final choice."""
        return min(self.done, key=lambda name: (self.done[name], name), default=None)

    def next_submissions(self, num_active: int, now_s: float) -> Workload:
        """Trials for the free slots."""
        count = min(self.spec.max_concurrent - num_active, self.spec.num_trials - self._num_submitted)
        first = self._num_submitted
        self._num_submitted += max(0, count)
        return tuple(
            Submission(
                name=f"trial-{index:05d}",
                time_s=now_s,
                application=self.spec.application,
                num_replicas=self.spec.num_replicas,
                batch_size=self.spec.batch_size,
            )
            for index in range(first, first + max(0, count))
        )

    def first_mark(self, submission: Submission) -> float:  # noqa: ARG002 -- all trials are of one kind
        """Progress at the first rung."""
        return self._mark(0)

    def reached(self, job: Job, now_s: float) -> float | None:  # noqa: ARG002 -- the protocol fixes the signature
        """A trial reports at a rung or at its end: it goes on to the next one, or is stopped."""
        name = job.submission.name
        report = round(job.progress * self.spec.max_reports)
        loss = loss_of(name, report, self.spec)
        self.losses[name] = loss
        if report >= self.spec.max_reports:
            self.done[name] = loss
            return None
        index = self.spec.rungs.index(report)
        recorded = self._recorded[index]
        is_worse = stops(recorded, loss, self.spec.reduction_factor)
        insort(recorded, loss)
        self._ranks[name] = (index, loss)
        if is_worse:
            self.stopped_at[name] = report
            return None
        return self._mark(index + 1)

    def pause_s(self, job: Job) -> float:  # noqa: ARG002 -- all trials are of one kind
        """What evaluating costs, and a checkpoint."""
        return self.spec.pause_s

    def outlook(self, job: Job) -> tuple[float | None, int | None, float | None]:
        """How likely a trial is to survive its next rung, the samples at which that is, and its last loss.

        A trial that has not reported yet survives with the ratio of the rung. One that has stands at some rank among
        all that reported there; it survives if it is again among the best of those that got as far, and ranks keep
        with some noise.
        """
        name = job.submission.name
        index, survival = 0, bounded(1 / self.spec.reduction_factor)
        if name in self._ranks:
            index, loss = self._ranks[name]
            survival = chance_after_rung(self._recorded[index], loss, self.spec.reduction_factor)
            index += 1
        if index >= len(self.spec.rungs):
            return None, None, self.losses.get(name)
        samples = round(self._mark(index) * job.length)
        return survival, samples, self.losses.get(name)

    def _mark(self, index: int) -> float:
        rungs = self.spec.rungs
        return rungs[index] / self.spec.max_reports if index < len(rungs) else 1.0


def loss_of(name: str, report: int, spec: SearchSpec) -> float:
    """The loss of a trial after so many reports: a power law towards its own floor, with a little noise, by seed."""
    draw = random.Random(f"search-{spec.seed}-{name}")
    floor = 1.0 + 0.6 * draw.random() ** 1.5
    height, decay = 0.8 + 0.8 * draw.random(), 0.5 + 0.4 * draw.random()
    noise = random.Random(f"search-{spec.seed}-{name}-{report}").gauss(0.0, 0.01)
    return float(floor + height * (1 + report) ** -decay + noise)
