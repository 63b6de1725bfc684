"""Where a trial's steps ran and what was beside them, as the ledger knows it: what telemetry rows do not say.

The rows of one window may straddle a change beside the trial; what is in force when they are taken in counts for all
of them, and the fit's medians outlive one window under a wrong heading. Called by the decider.
"""

from __future__ import annotations

import dataclasses

from orchestrator.control.state import RunState
from orchestrator.policies.learn.fit import Observation
from orchestrator.policies.plan import TrialId


def completed(state: RunState, trial_id: TrialId, seen: tuple[Observation, ...]) -> tuple[Observation, ...]:
    """The observations of a running trial with its nodes, its type of device and what others hold beside it."""
    line = state.ledger.lines[trial_id]
    devices = [state.devices[each] for each in line.placement if each in state.devices]
    if not devices:
        return seen
    slowest = min(devices, key=lambda device: (device.speed, device.device_type))
    crowd_share = max(state.ledger.held(device.device_id, but=trial_id) for device in devices)
    return tuple(
        dataclasses.replace(
            one,
            num_nodes=len({device.node_id for device in devices}),
            device_type=slowest.device_type,
            crowd_share=min(1.0, max(0.0, crowd_share)),
        )
        for one in seen
    )
