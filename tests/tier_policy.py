"""A policy that turns the precision of every trial to the cheapest allowed tier, for tests of what may come of it.

Pure like every policy. All else is as `static` leaves it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.policies import Allocation, Plan, Snapshot, Static, TrialView, effect_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cheapest:
    """The cheapest tier that a trial allows, from `from_step` on."""

    from_step: int = 8

    def decide(self, snapshot: Snapshot) -> Plan:
        """Static shares, and that tier."""
        plan, trials = Static().decide(snapshot), {trial.trial_id: trial for trial in snapshot.trials}
        rows = (self._row(row, snapshot, trials[row.trial_id]) for row in plan.allocations)
        return dataclasses.replace(plan, allocations=tuple(rows))

    def _row(self, row: Allocation, snapshot: Snapshot, trial: TrialView) -> Allocation:
        old, tier = snapshot.settings_in_force(trial), trial.limits.tiers[-1]
        if old is None or trial.step < self.from_step or old.tier is tier:
            return row
        settings = dataclasses.replace(old, tier=tier)
        return dataclasses.replace(row, settings=settings, effect=effect_of(old, settings), reason=f"{tier} is due")
