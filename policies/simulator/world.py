"""Devices and who holds them in a simulated world; and a job as its submission makes it, and as policies see it.

Keeps books only: when something happens is the engine's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from orchestrator.policies.plan import DeviceId, Settings, TrialId
from orchestrator.policies.simulator.application import Application, Applications
from orchestrator.policies.simulator.cluster import Cluster, Node, NodeEvent
from orchestrator.policies.simulator.job import Job
from orchestrator.policies.simulator.response import Load
from orchestrator.policies.simulator.rules import Rules
from orchestrator.policies.simulator.workload import Submission
from orchestrator.policies.snapshot import DeviceView, DialLimits, TrialView


@dataclass(slots=True)
class Devices:
    """The devices that are there, and the shares that jobs hold of them.

    Attributes:
        cluster: all nodes there will ever be.
        units: what a share of one is cut from.
        views: the devices present, by id.
        holders: shares by trial, for each device that anybody holds.
    """

    cluster: Cluster
    units: int
    views: dict[DeviceId, DeviceView] = field(default_factory=dict)
    holders: dict[DeviceId, dict[TrialId, float]] = field(default_factory=lambda: defaultdict(dict))
    _sorted: tuple[DeviceView, ...] | None = None
    _nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._nodes = {node.node_id: node for node in self.cluster.nodes}
        for node in self.cluster.present_at_start():
            self.join(node.node_id)

    def join(self, node_id: str) -> None:
        """A node is there from now on."""
        self.views.update({view.device_id: view for view in self._nodes[node_id].views(self.units)})
        self._sorted = None

    def leave(self, node_id: str) -> set[TrialId]:
        """A node is gone from now on; returns the jobs that held a device of it, which hold nothing of it any more."""
        hit: set[TrialId] = set()
        for device_id in [each for each, view in self.views.items() if view.node_id == node_id]:
            hit |= self.holders.pop(device_id, {}).keys()
            del self.views[device_id]
        self._sorted = None
        return hit

    def reprice(self, event: NodeEvent) -> None:
        """A node costs something else from now on."""
        self._nodes[event.node_id] = replace(self._nodes[event.node_id], price_per_hour=event.price_per_hour)
        if any(view.node_id == event.node_id for view in self.views.values()):
            self.join(event.node_id)

    def sorted(self) -> tuple[DeviceView, ...]:
        """The devices present, sorted by id."""
        if self._sorted is None:
            self._sorted = tuple(self.views[device_id] for device_id in sorted(self.views))
        return self._sorted

    def take(self, job: Job, placement: Iterable[DeviceId], share: float) -> None:
        """A job holds that share of those devices."""
        for device_id in placement:
            self.holders[device_id][job.trial_id] = share

    def give(self, job: Job) -> None:
        """A job holds nothing any more."""
        for device_id in job.placement:
            held = self.holders.get(device_id)
            if held is not None:
                held.pop(job.trial_id, None)
                if not held:
                    del self.holders[device_id]

    def neighbours(self, placement: Iterable[DeviceId]) -> set[TrialId]:
        """Who holds anything of those devices."""
        found: set[TrialId] = set()
        for device_id in placement:
            found |= self.holders.get(device_id, {}).keys()
        return found

    def load_of(self, job: Job, settings: Settings) -> Load:
        """What a job runs under on its placement."""
        views = [self.views[device_id] for device_id in job.placement]
        crowd = 0.0
        for device_id in job.placement:
            held = self.holders.get(device_id, {})
            if len(held) > 1:
                crowd = max(crowd, sum(share for other, share in held.items() if other != job.trial_id))
        return Load(
            num_workers=settings.num_workers,
            num_nodes=len({view.node_id for view in views}),
            micro_batch=settings.micro_batch,
            grad_accum=settings.grad_accum,
            tier=settings.tier,
            share=settings.share,
            crowd_share=round(crowd, 9),
            device_type=min(views, key=lambda view: view.speed).device_type,
        )

    def price_per_s(self, job: Job) -> float:
        """What a job costs while it holds its devices."""
        if job.settings is None or not job.placement:
            return 0.0
        present = (self.views[each].price_per_s for each in job.placement if each in self.views)
        return job.settings.share * sum(present)

    def cores_of(self, job: Job) -> float:
        """Units that each rank of a job holds."""
        return 0.0 if job.settings is None else job.settings.share * self.units


def job_of(submission: Submission, applications: Applications) -> Job:
    """The job of a submission.

    Raises:
        KeyError: there is no such application.
    """
    application = applications[submission.application]
    limits = DialLimits(
        min_share=application.min_share,
        max_share=1.0,
        min_global_batch=application.base_batch,
        max_global_batch=application.max_batch,
        max_micro_batch=application.max_micro_batch,
        tiers=application.tiers,
        can_pause=True,
        can_move=True,
        min_workers=1,
        max_workers=application.max_workers,
        min_micro_batch=application.min_micro_batch,
    )
    workers = min(submission.num_replicas, application.max_workers)
    batch = min(application.max_batch, max(application.base_batch, submission.batch_size, workers))
    return Job(
        submission=submission,
        application=application,
        trial_id=TrialId(submission.name),
        start=_whole_devices(application, application.base_batch, 1),
        requested=_whole_devices(application, batch, workers),
        limits=limits,
        mark=submission.stops_at,
    )


def _whole_devices(application: Application, global_batch: int, num_workers: int) -> Settings:
    micro_batch, grad_accum = application.split(global_batch, num_workers)
    return Settings(
        share=1.0,
        micro_batch=micro_batch,
        grad_accum=grad_accum,
        tier=application.tiers[0],
        num_workers=num_workers,
    )


def view_of(job: Job, rules: Rules, outlook: tuple[float | None, int | None, float | None]) -> TrialView:
    """A job as policies see it. `outlook` is what its search says: survival, samples at the next rung, loss."""
    settings = job.settings
    throughput = None if not job.is_running or settings is None else settings.global_batch / job.step_s
    submission = job.submission
    survival, rung_samples, loss = outlook
    return TrialView(
        trial_id=job.trial_id,
        shape=job.application.name if rules.inherits else job.trial_id,
        start=job.start,
        limits=job.limits,
        placement=job.placement,
        weight=1.0,
        step=int(job.steps),
        num_samples=int(job.samples),
        target_samples=max(1, round(job.length)) if rules.knows_lengths else None,
        throughput_per_s=throughput,
        loss=loss,
        is_stale=False,
        fit=job.fit,
        override=None,
        changed_at_s=job.changed_at_s,
        began_at_s=submission.time_s,
        progress=job.progress * job.length,
        attained_s=job.attained_s,
        user=submission.user,
        priority=submission.priority,
        deadline_s=None if submission.deadline_s is None else submission.time_s + submission.deadline_s,
        restart_s=rules.restart_s,
        num_restarts=max(0, job.num_starts - 1),
        requested=job.requested,
        survival=survival,
        rung_samples=rung_samples,
        memory_fixed_bytes=job.application.memory_fixed_bytes,
        memory_sample_bytes=job.application.memory_sample_bytes,
    )
