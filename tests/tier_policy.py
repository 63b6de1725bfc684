"""A policy that turns the precision of every trial to the cheapest allowed tier, for tests of what comes of it.

Pure like every policy. All else is as `static` leaves it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies import Allocation, Plan, Snapshot, Static, TrialView, effect_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cheapest:
    """The cheapest tier that a trial allows, from `from_step` on, and another share from twice as many steps on."""

    from_step: int = 8
    share: float | None = None

    def decide(self, snapshot: Snapshot) -> Plan:
        """Static shares at first, and that tier and share."""
        plan, trials = Static().decide(snapshot), {trial.trial_id: trial for trial in snapshot.trials}
        rows = (self._row(row, snapshot, trials[row.trial_id]) for row in plan.allocations)
        return dataclasses.replace(plan, allocations=tuple(rows))

    def _row(self, row: Allocation, snapshot: Snapshot, trial: TrialView) -> Allocation:
        old, tier = snapshot.settings_in_force(trial), trial.limits.tiers[-1]
        if old is None or trial.step < self.from_step:
            return row
        is_late = self.share is not None and trial.step >= 2 * self.from_step
        share = self.share if is_late and self.share is not None else old.share
        settings = dataclasses.replace(old, tier=tier, share=share)
        reason = f"{tier} and a share of {share:g} are due"
        return dataclasses.replace(row, settings=settings, effect=effect_of(old, settings), reason=reason)
