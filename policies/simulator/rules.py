"""How a simulated world behaves, apart from its jobs and devices: what restarts cost, how often things fail, the seed.

Values only. Given to the engine by whoever simulates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.policies.snapshot import Quota


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a simulated world behaves, apart from its jobs and devices.

    Attributes:
        interval_s: seconds between two decisions.
        decides_on_events: whether arrivals, endings and lost nodes lead to a decision at once, as in a live run.
        restart_s: what beginning on other devices or with other ranks costs a job.
        switch_s: what turning a dial live costs it.
        mtbf_s: mean seconds of running between failures of a job, inf for none.
        checkpoint_s: seconds between two checkpoints; a failure costs what was done since the last one.
        window_s: longest telemetry window; there are at most four between two decisions.
        step_spread: relative standard deviation of a window's mean step time.
        seed: of failures and of the spread.
        knows_lengths: whether policies are told how long jobs are.
        inherits: whether a job knows what earlier jobs of its application measured.
        units: what a share of a device is cut from, such as groups of streaming multiprocessors.
        horizon_s: when to stop at the latest; jobs that run then have not ended.
        quotas: the most devices of a user.
        limit_s: real seconds that one decision may take.
        keeps_timeline: whether spans and calibration are recorded.
    """

    interval_s: float = 60.0
    decides_on_events: bool = False
    restart_s: float = 30.0
    switch_s: float = 0.01
    mtbf_s: float = math.inf
    checkpoint_s: float = 600.0
    window_s: float = 15.0
    step_spread: float = 0.02
    seed: int = 0
    knows_lengths: bool = True
    inherits: bool = True
    units: int = 16
    horizon_s: float = math.inf
    quotas: tuple[Quota, ...] = ()
    limit_s: float = 120.0
    keeps_timeline: bool = True

    def __post_init__(self) -> None:
        for name in ("interval_s", "mtbf_s", "checkpoint_s", "window_s", "horizon_s", "limit_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: seconds > 0")
        for name in ("restart_s", "switch_s", "step_spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: a finite number >= 0")
