"""A policy that begins every trial in the cheapest tier, safe or not: the guard must leave it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.policies import Allocation, Plan, Snapshot
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.tier import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckless:
    """Goodput, but for the tier of a trial's first allocation."""

    cooldown_s: float = 0.5

    def decide(self, snapshot: Snapshot) -> Plan:
        """What goodput decides; of trials that have nothing in force yet in their cheapest tier."""
        plan = Goodput(cooldown_s=self.cooldown_s).decide(snapshot)
        new = {trial.trial_id: trial for trial in snapshot.trials if snapshot.settings_in_force(trial) is None}
        rows = []
        for row in plan.allocations:
            trial = new.get(row.trial_id)
            rows.append(row if trial is None else _cheapest(row, trial.limits.tiers))
        return replace(plan, allocations=tuple(rows))


def _cheapest(row: Allocation, tiers: tuple[Tier, ...]) -> Allocation:
    return replace(row, settings=replace(row.settings, tier=tiers[-1]), reason=f"reckless: begins in {tiers[-1]}")
