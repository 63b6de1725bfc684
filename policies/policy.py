"""The seam every policy fits into.

The contract, checked by `policies.conformance.check_policy`:

- `decide` is a pure function: no clock, no I/O, no randomness but `snapshot.seed`, no state but `snapshot.plan`.
- It returns a plan with `generation == snapshot.plan.generation + 1` that holds exactly one allocation for every trial
  of the snapshot, sorted by trial id, inside its limits; on the trial's own placement unless it may move.
- The sum of shares on a device never exceeds 1.
- The order of trials in the snapshot does not matter.
- In an unchanged world the second plan equals the first (no thrash).
"""

from __future__ import annotations

from typing import Protocol

from orchestrator.policies.plan import Plan
from orchestrator.policies.snapshot import Snapshot


class Policy(Protocol):
    """Decides the dials of every trial at once."""

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan for the world of `snapshot`."""
        ...
