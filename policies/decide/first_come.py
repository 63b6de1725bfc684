"""Movable trials served in the order in which they came, on the devices their users asked for, until they end.

Called by `fifo`, and by the policies that have no view of their own on where trials go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, wait
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.placing import as_wished, in_order, realise
from orchestrator.policies.plan import Allocation


def first_come(
    candidates: tuple[Candidate, ...], fleet: Fleet, budget: Budget, *, blocks: bool = True
) -> Iterator[Allocation]:
    """Rows that leave running trials alone and start waiting ones in order; one that does not fit may block."""
    running = [dataclasses.replace(candidate, is_pinned=True) for candidate in candidates if candidate.seats]
    given = realise(running, {}, fleet, budget)
    queue = [candidate for candidate in candidates if candidate.trial_id not in given]
    queue.sort(key=lambda candidate: (-candidate.trial.priority, candidate.trial.began_at_s, candidate.trial_id))
    started = realise(queue, in_order(queue, fleet, budget, blocks=blocks), fleet, budget, shrinks=False)
    place = {candidate.trial_id: position for position, candidate in enumerate(queue)}
    for candidate in candidates:
        if candidate.trial_id in given:
            yield keep(candidate, fleet, f"runs on its {len(candidate.seats)} devices until it ends", "first come")
        elif candidate.trial_id in started:
            seats, _ = started[candidate.trial_id]
            reason = f"starts on the {len(seats)} devices it asked for, {place[candidate.trial_id]} came before"
            yield run(candidate, fleet, seats, as_wished(candidate, len(seats)), reason, binding="first come")
        else:
            reason = f"waits for {candidate.wish.num_workers} devices, {place[candidate.trial_id]} came before"
            yield wait(candidate, reason)
