"""The CPU time that one rank really used, from its own step records, since its number of cores last changed.

Older time is forgotten by halves, so that a share that is no longer held shows within seconds. Called by
`telemetry.window`; judged by `share.verification`.
"""

from __future__ import annotations

import numpy as np

from orchestrator.share.verification import Usage
from orchestrator.telemetry.record import FLAG_APPLIED, StepArray

_MEMORY_S = 20.0


class UsageMeter:
    """Sums of one rank."""

    def __init__(self) -> None:
        self._begin(None)

    def _begin(self, cores: float | None) -> None:
        self._cores = cores
        self._wall_s = self._cpu_s = self._longest_s = 0.0
        self._num_steps = 0

    def add(self, rows: StepArray) -> None:
        """Take in accepted records, oldest first."""
        if not len(rows):
            return
        changes = np.flatnonzero(rows["cores"][1:] != rows["cores"][:-1])
        rows = rows[changes[-1] + 1 :] if len(changes) else rows
        if float(rows["cores"][-1]) != self._cores:
            self._begin(float(rows["cores"][-1]))
        mine = rows[(rows["flags"] & FLAG_APPLIED) == 0]  # before that one the old share held
        if not len(mine):
            return
        if self._wall_s > _MEMORY_S:
            self._wall_s, self._cpu_s, self._num_steps = self._wall_s / 2, self._cpu_s / 2, self._num_steps // 2
            self._longest_s = 0.0
        self._wall_s += float(mine["step_s"].sum(dtype=np.float64))
        self._cpu_s += float(mine["cpu_s"].sum(dtype=np.float64))
        self._num_steps += len(mine)
        self._longest_s = max(self._longest_s, float(mine["cpu_s"].max()))

    @property
    def now(self) -> Usage | None:
        """What was used, None before the first record."""
        if self._cores is None or not self._num_steps:
            return None
        return Usage(
            cores=round(self._cores, 4),
            num_steps=self._num_steps,
            wall_s=self._wall_s,
            cpu_s=self._cpu_s,
            longest_cpu_s=self._longest_s,
        )
