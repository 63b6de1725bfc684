"""The policy that leaves the user's settings alone.

Every trial gets its start share. Where the start shares of a device's trials do not fit, all of them are scaled down by
the same factor, none below its minimum; what one cannot give up the others do. Batch and tier stay as they are, which
is the start settings until a trial protects itself; it is never led back to what it fled from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies.decide.candidates import Budget, split
from orchestrator.policies.decide.first_come import first_come
from orchestrator.policies.decide.fitted import (
    FittedTrial,
    allocate,
    claim_of,
    fill_room,
    fit_trials,
    make_plan,
    make_room,
)
from orchestrator.policies.plan import Allocation, Plan
from orchestrator.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """Keeps the start settings.

    Attributes:
        pause_s: seconds for which a trial that paused itself is left alone.
    """

    pause_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.pause_s >= 0:
            raise ValueError(f"pause_s={self.pause_s!r}; allowed: seconds >= 0")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return start shares, scaled down where a device cannot hold them; movable trials are served as by `fifo`."""
        rest, candidates, fleet = split(snapshot)
        fitted_trials = fit_trials(rest)
        claims = [claim_of(s, weight=_start_share(s), max_share=_start_share(s)) for s in fitted_trials]
        room = make_room(fitted_trials, claims, self.pause_s)
        shares = fill_room(fitted_trials, room)
        rows = []
        for fitted in fitted_trials:
            resting = room.resting.get(fitted.trial_id)
            if resting is not None:
                settings = dataclasses.replace(fitted.settings, share=0.0)
                rows.append(allocate(fitted, settings, reason=f"share 0: {resting}", binding="paused"))
            else:
                rows.append(_granted(fitted, shares[fitted.trial_id]))
        return make_plan(snapshot, "static", [*rows, *first_come(candidates, fleet, Budget(snapshot))])


def _start_share(fitted: FittedTrial) -> float:
    limits = fitted.trial.limits
    return min(limits.max_share, max(limits.min_share, fitted.trial.start.share))


def _granted(fitted: FittedTrial, share: float) -> Allocation:
    start = _start_share(fitted)
    device_id = fitted.trial.placement[0]
    if fitted.is_pinned:
        reason, binding = f"share {share:.3f} of {device_id} kept while its telemetry is stale", "stale"
    elif share < start:
        reason, binding = f"share {share:.3f} of {device_id}: the start shares, {start:.3f} here, do not fit", "device"
    else:
        reason, binding = f"share {share:.3f} of {device_id}: its start share", "start"
    return allocate(fitted, dataclasses.replace(fitted.settings, share=share), reason=reason, binding=binding)
