"""A small application and a policy to simulate with, so that tests depend on no policy that may change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies.plan import Allocation, DeviceId, Generation, Plan, effect_of
from orchestrator.policies.simulator import Application, NoiseCurve, Parametric, Submission, Workload
from orchestrator.policies.snapshot import Snapshot

TOY = Application(
    name="toy",
    base_batch=10,
    max_batch=80,
    min_micro_batch=1,
    max_micro_batch=20,
    max_workers=8,
    num_samples=10_000.0,
    noise=NoiseCurve(ends=(0.5, 1.0), scales=(10.0, 1000.0)),
    response=Parametric(alpha_c=0.05, beta_c=0.005, alpha_r=0.1, alpha_n=0.3),
    requests=((1, 10), (2, 20)),
    min_share=0.25,
)
APPLICATIONS = {"toy": TOY}
ALONE_S = 1000 * 0.1
"""Seconds of a whole toy job on one device at its base batch."""


def submissions(*times: float, num_replicas: int = 1, batch_size: int = 10) -> Workload:
    return tuple(
        Submission(name=f"job-{i}", time_s=t, application="toy", num_replicas=num_replicas, batch_size=batch_size)
        for i, t in enumerate(times)
    )


@dataclass(frozen=True, kw_only=True)
class FirstFit:
    """In the order of ids, everyone gets what was requested as soon as it is free; share of each device as told."""

    share: float = 1.0

    def decide(self, snapshot: Snapshot) -> Plan:
        left = {device.device_id: 1.0 for device in snapshot.devices}
        for trial in snapshot.trials:
            for device_id in trial.placement:
                left[device_id] = left[device_id] - self.share
        rows = []
        for trial in sorted(snapshot.trials, key=lambda each: each.trial_id):
            placement = trial.placement
            asked = trial.requested or trial.start
            if not placement:
                free = [device_id for device_id, part in left.items() if part >= self.share - 1e-9]
                placement = self._take(left, free, asked.num_workers)
            settings = dataclasses.replace(asked, share=self.share if placement else 0.0)
            old = snapshot.settings_in_force(trial)
            rows.append(
                Allocation(
                    trial_id=trial.trial_id,
                    settings=settings,
                    placement=placement,
                    effect=effect_of(old, settings, moves=placement != trial.placement),
                    reason=f"{len(placement)} devices",
                    predicted_goodput=100.0,
                )
            )
        return Plan(generation=Generation(snapshot.plan.generation + 1), allocations=tuple(rows), reason="first fit")

    def _take(self, left: dict[DeviceId, float], free: list[DeviceId], count: int) -> tuple[DeviceId, ...]:
        if len(free) < count:
            return ()
        for device_id in free[:count]:
            left[device_id] -= self.share
        return tuple(free[:count])


class Raises:
    """A policy that always fails."""

    def decide(self, snapshot: Snapshot) -> Plan:
        raise RuntimeError("no idea")
