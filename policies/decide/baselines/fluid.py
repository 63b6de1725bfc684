"""Fluid: water-filling of devices, in fractions where there are more trials than devices.

The water level rises for all trials alike, by weight; who reaches the most it can use stops there. Above one device a
trial gets whole ones, below one a fraction, all fractions of a device equal. Speeds are not asked for.

Source: Yu et al., Fluid (MLSys 2021), section 4 (generalised water-filling), for trials of equal demand.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.policies.decide.candidates import Budget, split
from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.decide.water_fill import MAX_PER_DEVICE, water_fill
from orchestrator.policies.plan import Plan
from orchestrator.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Fluid:
    """Water-filling.

    Attributes:
        max_per_device: most trials on one device.
    """

    max_per_device: int = MAX_PER_DEVICE

    def __post_init__(self) -> None:
        if self.max_per_device < 1:
            raise ValueError(f"max_per_device={self.max_per_device!r}; allowed: 1 or more trials")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan of the water level. Trials that cannot move get fair shares of their devices."""
        rest, candidates, fleet = split(snapshot)
        rows = list(FairShare().decide(rest).allocations)
        if candidates:
            rows += water_fill(candidates, fleet, Budget(snapshot), self.max_per_device)
        return make_plan(snapshot, "fluid", rows)
