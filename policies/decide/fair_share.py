"""The policy that divides every device equally by weight, whatever the trials make of it.

Weighted max-min fairness: all shares rise in proportion to weight; who reaches a bound stops there and the rest goes to
the others. Batch and tier stay as they are, which is the start settings until a trial protects itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies.decide.candidates import Budget, split
from orchestrator.policies.decide.fitted import (
    FittedTrial,
    allocate,
    claim_of,
    fill_room,
    fit_trials,
    make_plan,
    make_room,
)
from orchestrator.policies.decide.water_fill import MAX_PER_DEVICE, water_fill
from orchestrator.policies.plan import Allocation, Plan
from orchestrator.policies.snapshot import Snapshot


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
        rest, candidates, fleet = split(snapshot)
        fitted_trials = fit_trials(rest)
        claims = [claim_of(s, weight=s.trial.weight, max_share=s.trial.limits.max_share) for s in fitted_trials]
        room = make_room(fitted_trials, claims, self.pause_s)
        shares = fill_room(fitted_trials, room)
        rows = []
        for fitted in fitted_trials:
            resting = room.resting.get(fitted.trial_id)
            if resting is not None:
                settings = dataclasses.replace(fitted.settings, share=0.0)
                rows.append(allocate(fitted, settings, reason=f"share 0: {resting}", binding="paused"))
            else:
                rows.append(_granted(fitted, shares[fitted.trial_id], len(room.claims)))
        return make_plan(
            snapshot, "fair_share", [*rows, *water_fill(candidates, fleet, Budget(snapshot), MAX_PER_DEVICE)]
        )


def _granted(fitted: FittedTrial, share: float, num_running: int) -> Allocation:
    limits, device_id = fitted.trial.limits, fitted.trial.placement[0]
    if fitted.is_pinned:
        reason, binding = f"share {share:.3f} of {device_id} kept while its telemetry is stale", "stale"
    else:
        reason = f"share {share:.3f} of {device_id}: weight {fitted.trial.weight:g} among {num_running} running trials"
        binding = {limits.max_share: "max_share", limits.min_share: "min_share"}.get(share, "device")
    return allocate(fitted, dataclasses.replace(fitted.settings, share=share), reason=reason, binding=binding)
