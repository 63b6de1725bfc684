"""How a fraction of a device is enforced, and who may use which units of it.

`SHARES` names every mechanism by the word used in run files and telemetry; nothing is found by scanning.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.share.cpu_cores import CpuCores
from orchestrator.share.logical import Logical
from orchestrator.share.mechanism import Enforcement, ShareMechanism
from orchestrator.share.sm_groups import SmGroups
from orchestrator.share.whole_gpu import Mps, TimeSlice

SHARES: dict[str, Callable[[], ShareMechanism]] = {
    CpuCores.name: CpuCores,
    SmGroups.name: SmGroups,
    Mps.name: Mps,
    TimeSlice.name: TimeSlice,
    Logical.name: Logical,
}

__all__ = ["SHARES", "CpuCores", "Enforcement", "Logical", "Mps", "ShareMechanism", "SmGroups", "TimeSlice"]
