"""Where the ranks of a worker group meet out of band when a trial ends.

A rank that raised alone has left the others inside a collective that will not end by itself; so the agreement on how a
trial ended never goes through the process group.
"""

from __future__ import annotations

import asyncio

from orchestrator.control.orders import Outcome, Status

LEAVE_TIMEOUT_S = 10.0
# A rank that begins again breaks off, and then the others fail for want of it: its own word is the cause.
_WORST_FIRST = (
    Status.MEMORY,
    Status.TIER,
    Status.FAILED,
    Status.LOST,
    Status.STOPPED,
    Status.INTERRUPTED,
    Status.DONE,
)


def agree(outcomes: dict[int, Outcome]) -> Outcome:
    """The common outcome: the worst status, told by the lowest rank that has it; names that rank when ranks differ."""
    return min(
        (outcome for _, outcome in sorted(outcomes.items())), key=lambda outcome: _WORST_FIRST.index(outcome.status)
    )


class Rendezvous:
    """Meetings by name; each is forgotten with its slot's next attach."""

    def __init__(self, timeout_s: float = LEAVE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._meetings: dict[str, tuple[str, dict[int, Outcome], asyncio.Event]] = {}

    def forget(self, slot_id: str) -> None:
        """The slot has new processes: its meetings are over."""
        self._meetings = {key: value for key, value in self._meetings.items() if value[0] != slot_id}

    async def meet(self, key: str, slot_id: str, rank: int, world_size: int, outcome: Outcome) -> Outcome | None:
        """Wait for all ranks; the common outcome, or None when not all came within the timeout."""
        _, outcomes, is_complete = self._meetings.setdefault(key, (slot_id, {}, asyncio.Event()))
        outcomes[rank] = outcome
        if len(outcomes) == world_size:
            is_complete.set()
        try:
            await asyncio.wait_for(is_complete.wait(), self._timeout_s)
        except TimeoutError:
            return None
        return agree(outcomes)
