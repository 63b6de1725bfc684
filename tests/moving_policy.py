"""A policy that moves trials from one device to the next, for tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies import Allocation, DeviceId, Generation, Plan, Snapshot, effect_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanders:
    """Each trial goes to the next device after so many of its samples, where it can leave the one that it is on.

    Devices are given whole; a trial whose next one is taken waits.
    """

    every: int = 600

    def decide(self, snapshot: Snapshot) -> Plan:
        rows = []
        free = {device.device_id for device in snapshot.devices}
        free -= {device_id for trial in snapshot.trials if not trial.limits.can_pause for device_id in trial.placement}
        for position, trial in enumerate(snapshot.trials):
            number = (position + trial.num_samples // self.every) % len(snapshot.devices)
            device_id = snapshot.devices[number].device_id
            placement: tuple[DeviceId, ...] = (device_id,) if device_id in free else ()
            if trial.placement and not trial.limits.can_pause:
                placement = trial.placement
            free -= set(placement)
            old = snapshot.settings_in_force(trial)
            settings = dataclasses.replace(trial.start, share=1.0 if placement else 0.0)
            rows.append(
                Allocation(
                    trial_id=trial.trial_id,
                    settings=settings,
                    placement=placement,
                    effect=effect_of(old, settings, moves=placement != trial.placement),
                    reason=f"device {number} after {trial.num_samples} samples",
                )
            )
        generation = Generation(snapshot.plan.generation + 1)
        return Plan(generation=generation, allocations=tuple(rows), reason="from one device to the next")
