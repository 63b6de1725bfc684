"""The policy that turns all dials by predicted goodput: throughput from measured speeds times statistical efficiency.

Shares: `policies.decide.division`. Batch and tier: `policies.decide.dials`. Nothing is assumed faster before it was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.policies.decide.candidates import Budget, split
from orchestrator.policies.decide.dials import beginnings, choose, explorers
from orchestrator.policies.decide.division import Granted, Rules, divide
from orchestrator.policies.decide.first_come import first_come
from orchestrator.policies.decide.fitted import FittedTrial, allocate, fit_trials, make_plan
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.snapshot import Snapshot
from orchestrator.policies.tier import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Shares, batch and tier by predicted goodput, one small step at a time.

    Attributes:
        guarantee: part of its fair share that a trial keeps whatever the others gain by it.
        min_gain: predicted relative gain below which nothing is changed.
        cooldown_s: seconds after a change in which a trial's dials rest, less in a short trial (a twentieth of its time
            for batch and tier); arrivals and departures still move shares.
        quantum: grid of shares, so that noise in the fits cannot make them tremble.
        explores: whether one trial of each shape may try a cheaper tier that nobody has measured.
    """

    guarantee: float = 0.5
    min_gain: float = 0.05
    cooldown_s: float = 10.0
    quantum: float = 1 / 64
    explores: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.guarantee <= 1:
            raise ValueError(f"guarantee={self.guarantee!r}; allowed: 0 to 1, a part of the fair share")
        if not 0 <= self.min_gain < 10:
            raise ValueError(f"min_gain={self.min_gain!r}; allowed: 0 to 10, such as 0.05 for 5 %")
        if not self.cooldown_s >= 0:
            raise ValueError(f"cooldown_s={self.cooldown_s!r}; allowed: seconds >= 0")
        if not 1e-3 <= self.quantum <= 1:
            raise ValueError(f"quantum={self.quantum!r}; allowed: 0.001 to 1, a part of a device")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the next small step towards the largest goodput; movable trials are served as by `fifo`."""
        return self.decide_by(snapshot, {})

    def decide_by(self, snapshot: Snapshot, urgency: Mapping[TrialId, float]) -> Plan:
        """The same where an objective makes some trials count for more or less when shares are divided."""
        rest, candidates, fleet = split(snapshot)
        fitted_trials = fit_trials(rest)
        rules = Rules(
            guarantee=self.guarantee,
            min_gain=self.min_gain,
            cooldown_s=self.cooldown_s,
            quantum=self.quantum,
            urgency=urgency,
        )
        granted = divide(rest, fitted_trials, rules)
        exploring = explorers(fitted_trials, self.cooldown_s) if self.explores else {}
        begun = beginnings(fitted_trials, self.min_gain)
        rows = [
            self._allocate(s, granted[s.trial_id], exploring.get(s.trial_id), begun.get(s.trial_id))
            for s in fitted_trials
        ]
        return make_plan(snapshot, "goodput", [*rows, *first_come(candidates, fleet, Budget(snapshot))])

    def _allocate(
        self, fitted: FittedTrial, granted: Granted, explored: Tier | None, begins_in: Tier | None
    ) -> Allocation:
        choice = choose(
            fitted,
            granted.share,
            min_gain=self.min_gain,
            cooldown_s=self.cooldown_s,
            explored=explored,
            begins_in=begins_in,
        )
        old = fitted.in_force
        is_share_news = old is None or old.share != granted.share
        is_dial_news = old is not None and choice.settings != old and not is_share_news
        return allocate(
            fitted,
            choice.settings,
            reason=f"{choice.reason}; {granted.reason}",
            # What bound the dial that moved is what one wants to know; between two that rest, batch and tier.
            binding=choice.binding if is_dial_news or not is_share_news else granted.binding,
            alternatives=choice.alternatives,
        )
