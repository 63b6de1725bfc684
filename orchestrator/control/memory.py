"""What memory a trial is granted, and what the policies are told of what it takes.

A GPU's memory is cut into equal parts for the ranks of the slots that are open on it: slots live long, so a grant does
not shrink when another trial comes. The memory of a CPU node is nobody's part; its ranks look for themselves.
"""

from __future__ import annotations

from typing import TypedDict

from orchestrator.control.world import Run, Trial, World
from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.learn.memory import solve_line
from orchestrator.policies.plan import DeviceId, Settings
from orchestrator.policies.snapshot import DeviceKind

CONTEXT_BYTES = 768 << 20
"""What a process takes of a GPU beside its tensors: the CUDA context, its libraries' kernels, workspaces, buffers."""


class MemoryFields(TypedDict):
    """The fields of a `TrialView` that speak of memory."""

    memory_fixed_bytes: int
    memory_sample_bytes: int
    memory_limit_bytes: int
    resume: Settings | None


def granted_bytes(world: World, placement: tuple[DeviceId, ...]) -> int:
    """Memory for the tensors of each rank of a trial on these devices; 0 where nothing is known or granted."""
    granted = []
    for device_id in set(placement):
        device = world.devices[device_id]
        if device.kind is not DeviceKind.CUDA or device.memory_bytes <= 0:
            return 0
        open_ranks = sum(slot.hello.placement.count(device_id) for slot in world.open_slots() if slot.hello is not None)
        granted.append(device.memory_bytes // max(1, open_ranks) - CONTEXT_BYTES)
    return max(0, min(granted, default=0))


def memory_fields(world: World, run: Run, trial: Trial, fit: TrialFit) -> MemoryFields:
    """What a policy shall know of the trial's memory; nothing of its devices while it is on none."""
    placement = () if trial.account is None else trial.account.placement
    settings = (None if trial.account is None else trial.account.settings) or run.spec.start
    line = solve_line(fit.memory, settings.tier, len(placement)) if placement else None
    is_known = line is not None and world.devices[placement[0]].kind is DeviceKind.CUDA
    return MemoryFields(
        memory_fixed_bytes=int(line.fixed_bytes) if line is not None and is_known else 0,
        memory_sample_bytes=int(line.sample_bytes) if line is not None and is_known else 0,
        memory_limit_bytes=granted_bytes(world, placement),
        resume=trial.resume or trial.onward,
    )
