"""Movable trials served in the order in which they came, on the devices their users asked for, until they end.

Called by `fifo`, and by the policies that have no view of their own on where trials go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from orchestrator.policies.fleet import Fleet
from orchestrator.policies.movable import Budget, Mover, keep, run, wait
from orchestrator.policies.placing import as_wished, in_order, realise
from orchestrator.policies.plan import Allocation


def first_come(movers: tuple[Mover, ...], fleet: Fleet, budget: Budget, *, blocks: bool = True) -> Iterator[Allocation]:
    """Rows that leave running trials alone and start waiting ones in order; one that does not fit may block."""
    running = [dataclasses.replace(mover, is_pinned=True) for mover in movers if mover.seats]
    given = realise(running, {}, fleet, budget)
    queue = [mover for mover in movers if mover.trial_id not in given]
    queue.sort(key=lambda mover: (-mover.trial.priority, mover.trial.began_at_s, mover.trial_id))
    started = realise(queue, in_order(queue, fleet, budget, blocks=blocks), fleet, budget, shrinks=False)
    place = {mover.trial_id: position for position, mover in enumerate(queue)}
    for mover in movers:
        if mover.trial_id in given:
            yield keep(mover, fleet, f"runs on its {len(mover.seats)} devices until it ends", "first come")
        elif mover.trial_id in started:
            seats, _ = started[mover.trial_id]
            reason = f"starts on the {len(seats)} devices it asked for, {place[mover.trial_id]} came before"
            yield run(mover, fleet, seats, as_wished(mover, len(seats)), reason, binding="first come")
        else:
            reason = f"waits for {mover.wish.num_workers} devices, {place[mover.trial_id]} came before"
            yield wait(mover, reason)
