"""Promises of a plan counted anew from its numbers alone, so that not only `policies.invariants` looks after them."""

from __future__ import annotations

import math
from collections import defaultdict

from orchestrator.policies.plan import DeviceId, Plan
from orchestrator.policies.snapshot import Snapshot

_TOLERANCE = 1e-9


def broken_promises(world: Snapshot, plan: Plan) -> list[str]:
    """Guaranteed minima and quotas that a plan violates, and devices that it gives out more than once."""
    present = {device.device_id for device in world.devices}
    trials = {trial.trial_id: trial for trial in world.trials}
    load: dict[DeviceId, list[float]] = defaultdict(list)
    before: dict[str, float] = defaultdict(float)
    after: dict[str, float] = defaultdict(float)
    found = []
    for row in plan.allocations:
        trial = trials[row.trial_id]
        old = world.settings_in_force(trial)
        held = 0.0 if old is None else old.share * len(trial.placement)
        given = row.settings.share * len(row.placement)
        before[trial.user] += held
        after[trial.user] += given
        for device_id in row.placement:
            load[device_id].append(row.settings.share)
        if present.issuperset(trial.placement) and given < min(trial.guaranteed, held) - _TOLERANCE:
            found.append(f"guaranteed: {row.trial_id} gets {given:g} of {trial.guaranteed:g}, and had {held:g}")
    for device_id, shares in load.items():
        if math.fsum(shares) > 1 + _TOLERANCE:
            found.append(f"over-committed: {device_id} by {math.fsum(shares):g}")
    for quota in world.quotas:
        if after[quota.user] > max(quota.max_devices, before[quota.user]) + _TOLERANCE:
            found.append(f"quota: {quota.user} gets {after[quota.user]:g} of {quota.max_devices:g}")
    return found
