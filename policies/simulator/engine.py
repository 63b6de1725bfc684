"""The discrete-event engine: a workload on a cluster under any policy, with a manual clock, the same for the same seed.

The loop of a live run, with a response for workers: telemetry windows become observations, the pure `fit.update` learns
from them, a snapshot is frozen, the policy decides, the invariants are checked, and the plan takes effect at its cost.
Nothing here knows which policy it is. Called by `policies.simulator.simulate`.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from orchestrator.policies.learn.fit import TrialFit, inherit, update
from orchestrator.policies.plan import EMPTY_PLAN, Allocation, Effect, Plan, TrialId, effect_of, is_same
from orchestrator.policies.simulator.application import Applications
from orchestrator.policies.simulator.cluster import Cluster, NodeChange, NodeEvent
from orchestrator.policies.simulator.guard import Guard
from orchestrator.policies.simulator.job import Job
from orchestrator.policies.simulator.overseer import Nobody, Overseer
from orchestrator.policies.simulator.patience import NUM_IDLE, Patience
from orchestrator.policies.simulator.record import Span, Timeline
from orchestrator.policies.simulator.response import Load
from orchestrator.policies.simulator.rules import Rules
from orchestrator.policies.simulator.workload import Submission, Workload
from orchestrator.policies.simulator.world import Devices, job_of, view_of
from orchestrator.policies.snapshot import Snapshot

_NUM_DRAWS = 4096


class _What(IntEnum):
    """Kinds of events, in the order in which those of one instant are handled."""

    NODE = 0
    ARRIVAL = 1
    MARK = 2
    FAILURE = 3
    TICK = 4


@dataclass(slots=True)
class Engine:
    """One simulation. Build it, then `run` it once; `stopped` then says why it would not have ended, if so."""

    guard: Guard
    applications: Applications
    cluster: Cluster
    rules: Rules
    overseer: Overseer = field(default_factory=Nobody)
    make: Callable[[Submission, Applications], Job] = job_of
    now_s: float = 0.0
    plan: Plan = EMPTY_PLAN
    jobs: dict[TrialId, Job] = field(default_factory=dict)
    active: dict[TrialId, Job] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    stopped: str | None = None
    _patience: Patience = field(init=False)
    _devices: Devices = field(init=False)
    _events: list[tuple[float, int, int, object]] = field(default_factory=list)
    _order: int = 0
    _next_tick_s: float | None = None
    _shape_fits: dict[str, TrialFit] = field(default_factory=dict)
    _speeds: dict[tuple[str, Load], float] = field(default_factory=dict)
    _draws: list[float] = field(default_factory=list)
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._devices = Devices(self.cluster, self.rules.units)
        self._patience = Patience(interval_s=self.rules.interval_s, horizon_s=self.rules.horizon_s)
        self._rng = random.Random(f"engine-{self.rules.seed}")
        self._draws = [self._rng.gauss(0.0, 1.0) for _ in range(_NUM_DRAWS)]

    def run(self, workload: Workload) -> None:
        """Simulate until every job has ended, the horizon, or it is clear that neither will come."""
        for submission in workload:
            self._push(submission.time_s, _What.ARRIVAL, submission)
        for event in self.cluster.events:
            self._push(event.time_s, _What.NODE, event)
        try:
            while self._events and self._events[0][0] <= self.rules.horizon_s:
                time_s, what, _, subject = heapq.heappop(self._events)
                self.now_s = time_s
                self._handle(_What(what), subject)
                if not self.active and not any(event[1] == _What.ARRIVAL for event in self._events):
                    break
                if self.stopped is not None:
                    break
        finally:
            self.guard.close()
        if self.active:
            self.now_s = max(self.now_s, min(self.rules.horizon_s, self.now_s + self.rules.interval_s))
            for job in self.active.values():
                self._advance(job)
        self.timeline.close(self.now_s)

    # Events.

    def _push(self, time_s: float, what: _What, subject: object) -> None:
        self._order += 1
        heapq.heappush(self._events, (time_s, int(what), self._order, subject))

    def _handle(self, what: _What, subject: object) -> None:
        if what is _What.TICK:
            if subject == self._next_tick_s:
                self._tick()
        elif isinstance(subject, Submission):
            self._arrive(subject)
        elif isinstance(subject, NodeEvent):
            self._change_node(subject)
        elif isinstance(subject, tuple):
            job, version = subject
            if job.version == version and job.ended_s is None:
                self._mark(job) if what is _What.MARK else self._fail(job)

    def _arrive(self, submission: Submission) -> None:
        self._patience.renew()
        job = self.make(submission, self.applications)
        job.mark = self.overseer.first_mark(submission)
        job.updated_s = job.changed_at_s = self.now_s
        if self.rules.inherits and job.application.name in self._shape_fits:
            job.fit = inherit(self._shape_fits[job.application.name])
        self.jobs[job.trial_id] = self.active[job.trial_id] = job
        self._wake()

    def _wake(self) -> None:
        """See to it that there is a decision: at once, or at the next full interval."""
        interval_s = self.rules.interval_s
        time_s = self.now_s if self.rules.decides_on_events else math.ceil(self.now_s / interval_s) * interval_s
        if self._next_tick_s is None or time_s < self._next_tick_s:
            self._next_tick_s = time_s
            self._push(time_s, _What.TICK, time_s)

    def _mark(self, job: Job) -> None:
        """A job reached its mark: it goes on to the next, or ends."""
        self._patience.renew()
        self._advance(job)
        job.progress = job.mark
        mark = self.overseer.reached(job, self.now_s)
        if mark is not None and mark > job.progress:
            job.mark = mark
            job.ready_s = max(job.ready_s, self.now_s) + self.overseer.pause_s(job)
            self._foresee(job)
            if self.rules.decides_on_events:
                self._wake()
            return
        job.ended_s = self.now_s
        job.ends_early = job.progress < 1.0
        self._leave_devices(job)
        del self.active[job.trial_id]
        for submission in self.overseer.next_submissions(len(self.active), self.now_s):
            self._arrive(submission)
        if self.rules.decides_on_events and self.active:
            self._wake()

    def _fail(self, job: Job) -> None:
        """A job is thrown back to its last checkpoint and starts again where it is."""
        self._advance(job)
        self._throw_back(job)
        job.ready_s = self.now_s + self.rules.restart_s
        self._foresee(job)

    def _throw_back(self, job: Job) -> None:
        running_s = max(0.0, self.now_s - job.ready_s)
        job.fall_back(min(running_s, math.fmod(running_s, self.rules.checkpoint_s)))
        job.num_failures += 1

    def _change_node(self, event: NodeEvent) -> None:
        self._patience.renew()
        if event.change is NodeChange.PRICE:
            for job in self.active.values():
                self._advance(job)
            self._devices.reprice(event)
            return
        if event.change is NodeChange.JOINS:
            self._devices.join(event.node_id)
        else:
            for job in self.active.values():
                self._advance(job)
            for trial_id in sorted(self._devices.leave(event.node_id)):
                job = self.active[trial_id]
                self._throw_back(job)
                self._leave_devices(job)
        if self.active:
            self._wake()

    # Decisions.

    def _tick(self) -> None:
        self._next_tick_s = None
        if not self.active:
            return
        for job in self.active.values():
            self._advance(job)
            self._learn(job)
        snapshot = self._snapshot()
        plan = self.guard.decide(snapshot)
        if self.rules.keeps_timeline:
            self.timeline.expect(self.now_s, plan, self.active)
        if not is_same(self.plan, plan):
            self.plan = plan
        self._apply(plan)
        interval_s = self.rules.interval_s
        self._next_tick_s = (math.floor(self.now_s / interval_s) + 1) * interval_s
        self._push(self._next_tick_s, _What.TICK, self._next_tick_s)
        is_due = (self._patience.num_idle + 1) % NUM_IDLE == 0  # a look at all events costs more than a decision
        self.stopped = self._patience.look(self.now_s, self.active.values(), self._next_s() if is_due else None)

    def _next_s(self) -> float | None:
        """When anything happens next that is neither a decision nor a failure."""
        times = (time_s for time_s, what, _, subject in self._events if self._counts(_What(what), subject))
        return min((time_s for time_s in times if time_s < math.inf), default=None)

    def _counts(self, what: _What, subject: object) -> bool:
        if what is _What.MARK:
            assert isinstance(subject, tuple)
            job, version = subject
            return bool(job.version == version and job.ended_s is None)
        return what in {_What.NODE, _What.ARRIVAL}

    def _learn(self, job: Job) -> None:
        if not job.windows:
            return
        offset = self._rng.randrange(_NUM_DRAWS - 8)
        observations = job.observations(self.rules.window_s, self.rules.step_spread, self._draws[offset : offset + 8])
        if observations:
            job.fit = update(job.fit, observations)
            self._shape_fits[job.application.name] = job.fit

    def _snapshot(self) -> Snapshot:
        rules = self.rules
        trials = [view_of(job, rules, self.overseer.outlook(job)) for _, job in sorted(self.active.items())]
        return Snapshot(
            now_s=self.now_s,
            seed=rules.seed,
            plan=self.plan,
            devices=self._devices.sorted(),
            trials=tuple(trials),
            quotas=rules.quotas,
        )

    def _apply(self, plan: Plan) -> None:
        """Let everyone go who leaves anything, then let the others have it, then see how fast all of them are."""
        changed: list[tuple[Job, Allocation]] = []
        touched: set[TrialId] = set()
        for row in plan.allocations:
            job = self.active[row.trial_id]
            if job.settings == row.settings and job.placement == row.placement:
                continue
            changed.append((job, row))
            touched |= self._devices.neighbours(job.placement)
            self._devices.give(job)
        for job, row in changed:
            self._turn(job, row)
            self._devices.take(job, job.placement, row.settings.share)
            touched |= self._devices.neighbours(job.placement)
            touched.add(job.trial_id)
        for trial_id in sorted(touched):
            self._set_speed(self.active[trial_id])

    def _turn(self, job: Job, row: Allocation) -> None:
        """One job's new settings, with what they cost it."""
        before, job.settings = job.settings, row.settings
        moves = job.placement != row.placement
        job.placement = row.placement
        job.changed_at_s = self.now_s
        if moves or before is None or effect_of(before, row.settings) is Effect.RESTART:
            if row.placement:
                job.ready_s = self.now_s + self.rules.restart_s
                job.num_starts += 1
                job.began_s = self.now_s if job.began_s is None else job.began_s
        elif row.placement:
            job.ready_s = max(job.ready_s, self.now_s) + self.rules.switch_s
            job.num_changes += 1

    # Speeds.

    def _advance(self, job: Job) -> None:
        job.advance(self.now_s, self._devices.price_per_s(job), self._devices.cores_of(job))

    def _leave_devices(self, job: Job) -> None:
        touched = self._devices.neighbours(job.placement) - {job.trial_id}
        self._devices.give(job)
        job.placement = ()
        self._set_speed(job)
        for trial_id in sorted(touched):
            self._advance(self.active[trial_id])
            self._set_speed(self.active[trial_id])

    def _set_speed(self, job: Job) -> None:
        """The true speed of a job under what it now has, and when it will reach its mark."""
        settings = job.settings
        if settings is None or not job.placement or settings.share <= 0 or job.ended_s is not None:
            job.load, job.step_s = None, 0.0
        else:
            load = self._devices.load_of(job, settings)
            if load == job.load and job.step_s > 0:
                self._foresee(job)
                return
            job.load, job.step_s = load, self._step_s(job, load)
        self._foresee(job)

    def _step_s(self, job: Job, load: Load) -> float:
        key = (job.application.name, load)
        if key not in self._speeds:
            self._speeds[key] = job.application.response.step_s(load)
        return self._speeds[key]

    def _foresee(self, job: Job) -> None:
        job.version += 1
        if self.rules.keeps_timeline:
            self.timeline.note(self.now_s, _span(job))
        if not job.is_running:
            return
        begins_s = max(self.now_s, job.ready_s)
        self._push(begins_s + job.seconds_to(job.mark), _What.MARK, (job, job.version))
        if self.rules.mtbf_s < math.inf:
            fails_s = begins_s + self._rng.expovariate(1 / self.rules.mtbf_s)
            self._push(fails_s, _What.FAILURE, (job, job.version))


def _span(job: Job) -> Span:
    settings = job.settings
    return Span(
        name=job.submission.name,
        application=job.application.name,
        placement=job.placement,
        share=0.0 if settings is None else settings.share,
        global_batch=0 if settings is None else settings.global_batch,
        tier="" if settings is None else settings.tier.value,
    )
