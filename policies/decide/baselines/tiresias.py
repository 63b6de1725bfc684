"""Tiresias: two-dimensional attained service, least first, in discretised queues.

A trial's attained service is the device-seconds it was granted; what it will still need is not asked. Trials with less
than the first threshold form the first queue, and so on; each queue is first come, first served, and a trial of an
earlier queue takes the devices of one of a later queue. Ranks and batch are what the user asked for.

Source: Gu et al., Tiresias (NSDI 2019), section 4.1 (Discretized 2D-LAS) with two queues split at 16 GPU-hours, as in
the evaluation of Pollux (OSDI 2021, section 5.1). Unlike there, a placement consolidates always, and starvation is
not looked after (its promotion is off there, too).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.policies.decide.baselines.fixed import with_fixed
from orchestrator.policies.decide.candidates import Budget, Candidate, keep, run, wait
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.placing import as_wished, in_order, realise
from orchestrator.policies.plan import Allocation, Plan
from orchestrator.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiresias:
    """Least attained service first.

    Attributes:
        thresholds_s: device-seconds at which a trial falls into the next queue, ascending.
    """

    thresholds_s: tuple[float, ...] = (16 * 3600.0,)

    def __post_init__(self) -> None:
        if list(self.thresholds_s) != sorted(self.thresholds_s) or not all(t > 0 for t in self.thresholds_s):
            raise ValueError(f"thresholds_s={self.thresholds_s!r}; allowed: ascending device-seconds > 0")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan that serves the queues in order."""
        return make_plan(snapshot, "tiresias", with_fixed(snapshot, self._place))

    def _place(self, candidates: tuple[Candidate, ...], fleet: Fleet, budget: Budget) -> Iterator[Allocation]:
        pinned = [candidate for candidate in candidates if candidate.is_pinned]
        given = realise(pinned, {}, fleet, budget)
        others = [candidate for candidate in candidates if not candidate.is_pinned]
        others.sort(key=lambda m: (-m.trial.priority, self._queue(m), m.trial.began_at_s, m.trial_id))
        given |= realise(others, in_order(others, fleet, budget, blocks=False), fleet, budget, shrinks=False)
        for candidate in candidates:
            hours = candidate.trial.attained_s / 3600
            where = f"{hours:.2f} device-hours attained, queue {self._queue(candidate)}"
            if candidate.trial_id not in given:
                yield wait(candidate, f"waits for {candidate.wish.num_workers} devices: {where}", "queue")
            elif candidate.is_pinned:
                yield keep(candidate, fleet, f"keeps its {len(candidate.seats)} devices: {where}", "pinned")
            else:
                seats, _ = given[candidate.trial_id]
                reason = f"runs on the {len(seats)} devices it asked for: {where}"
                yield run(candidate, fleet, seats, as_wished(candidate, len(seats)), reason, binding="queue")

    def _queue(self, candidate: Candidate) -> int:
        return bisect.bisect_right(self.thresholds_s, candidate.trial.attained_s)
