"""A policy that moves trials from one device to the next, for tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies import Allocation, Generation, Plan, Snapshot, effect_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanders:
    """Each trial goes to the next device after so many of its samples, where it can leave the one that it is on."""

    every: int = 600

    def decide(self, snapshot: Snapshot) -> Plan:
        rows = []
        for position, trial in enumerate(snapshot.trials):
            number = (position + trial.num_samples // self.every) % len(snapshot.devices)
            placement = (snapshot.devices[number].device_id,)
            if trial.placement and not trial.limits.can_pause:
                placement = trial.placement  # type: ignore[assignment]
            old = snapshot.settings_in_force(trial)
            settings = dataclasses.replace(trial.start, share=1.0 / len(snapshot.trials))
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
