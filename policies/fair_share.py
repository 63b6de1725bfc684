"""The policy that divides every device equally by weight, whatever the trials make of it.

Weighted max-min fairness: all shares rise in proportion to weight; who reaches a bound stops there and the rest goes to
the others. Batch and tier stay as they are, which is the start settings until a trial protects itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies.movable import Budget, split
from orchestrator.policies.plan import Allocation, Plan
from orchestrator.policies.snapshot import Snapshot
from orchestrator.policies.water_fill import MAX_PER_DEVICE, water_fill
from orchestrator.policies.world import Standing, allocate, claim_of, fill_room, make_plan, make_room, read


@dataclass(frozen=True, slots=True, kw_only=True)
class FairShare:
    """Equal shares by weight on every device.

    Attributes:
        pause_s: seconds for which a trial that paused itself is left alone.
    """

    pause_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.pause_s >= 0:
            raise ValueError(f"pause_s={self.pause_s!r}; allowed: seconds >= 0")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return fair shares; movable trials are served as by `fluid`."""
        rest, movers, fleet = split(snapshot)
        standings = read(rest)
        claims = [claim_of(s, weight=s.trial.weight, max_share=s.trial.limits.max_share) for s in standings]
        room = make_room(standings, claims, self.pause_s)
        shares = fill_room(standings, room)
        rows = []
        for standing in standings:
            resting = room.resting.get(standing.trial_id)
            if resting is not None:
                settings = dataclasses.replace(standing.settings, share=0.0)
                rows.append(allocate(standing, settings, reason=f"share 0: {resting}", binding="paused"))
            else:
                rows.append(_granted(standing, shares[standing.trial_id], len(room.claims)))
        return make_plan(snapshot, "fair_share", [*rows, *water_fill(movers, fleet, Budget(snapshot), MAX_PER_DEVICE)])


def _granted(standing: Standing, share: float, num_running: int) -> Allocation:
    limits, device_id = standing.trial.limits, standing.trial.placement[0]
    if standing.is_pinned:
        reason, binding = f"share {share:.3f} of {device_id} kept while its telemetry is stale", "stale"
    else:
        reason = (
            f"share {share:.3f} of {device_id}: weight {standing.trial.weight:g} among {num_running} running trials"
        )
        binding = {limits.max_share: "max_share", limits.min_share: "min_share"}.get(share, "device")
    return allocate(standing, dataclasses.replace(standing.settings, share=share), reason=reason, binding=binding)
