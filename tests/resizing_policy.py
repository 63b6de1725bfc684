"""Policies that turn the number of ranks of every trial to two and back, for tests of the way.

Pure like every policy. All else is as `static` leaves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.policies import Allocation, Effect, Plan, Snapshot, Static, TrialView


@dataclass(frozen=True, slots=True, kw_only=True)
class BySamples:
    """Two ranks from `grow_at` samples to `shrink_at`, one before and after."""

    grow_at: int = 1000
    shrink_at: int = 2000

    def decide(self, snapshot: Snapshot) -> Plan:
        """Static shares, and the number of ranks that is due."""
        return _static(snapshot, lambda trial: 2 if self.grow_at <= trial.num_samples < self.shrink_at else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThereAndBack:
    """Two ranks until so many steps of them were measured, then one; however long that takes."""

    num_steps: int = 50

    def decide(self, snapshot: Snapshot) -> Plan:
        """Static shares, and the number of ranks that is due."""
        return _static(snapshot, lambda trial: 1 if self._is_known(trial) else 2)

    def _is_known(self, trial: TrialView) -> bool:
        return any(cell.num_workers == 2 and cell.num_steps >= self.num_steps for cell in trial.fit.cells)


def _static(snapshot: Snapshot, due: Callable[[TrialView], int]) -> Plan:
    """Static shares, and the number of ranks that is due for each trial."""
    plan, trials = Static().decide(snapshot), {trial.trial_id: trial for trial in snapshot.trials}
    rows = (_with_ranks(row, trials[row.trial_id], due(trials[row.trial_id])) for row in plan.allocations)
    return dataclasses.replace(plan, allocations=tuple(rows))


def _with_ranks(row: Allocation, trial: TrialView, due: int) -> Allocation:
    low, high = trial.limits.min_workers or due, trial.limits.max_workers or due
    if due == len(trial.placement) or not low <= due <= high:
        return row
    return dataclasses.replace(row, resize_to=due, effect=Effect.RESTART, reason=f"{due} ranks are due")
