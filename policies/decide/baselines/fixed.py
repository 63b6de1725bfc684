"""What policies that give out whole devices do with trials that cannot move: they keep their start shares.

Called by the policies named after schedulers for whole devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.policies.decide.candidates import Budget, Candidate, split
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.static import Static
from orchestrator.policies.plan import Allocation
from orchestrator.policies.snapshot import Snapshot


def with_fixed(
    snapshot: Snapshot, place: Callable[[tuple[Candidate, ...], Fleet, Budget], Iterable[Allocation]]
) -> list[Allocation]:
    """Rows for everyone: what cannot move keeps its start share as `static` gives it, `place` makes the others'."""
    rest, candidates, fleet = split(snapshot)
    rows = list(Static().decide(rest).allocations)
    if candidates:
        rows += place(candidates, fleet, Budget(snapshot))
    return rows
