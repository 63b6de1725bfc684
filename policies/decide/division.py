"""Dividing devices by predicted goodput: a guaranteed part of the fair share, the rest to where it helps most.

A trial's utility is its speed-up over its fair share (as in Pollux, OSDI 2021, section 4.2): samples of different
models are no common currency, speed-ups are. Batch and tier drop out of it. Called by `policies.decide.goodput`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.policies.decide.fitted import FittedTrial, claim_of, make_room
from orchestrator.policies.decide.shares import Claim, climb, components, fill, fits
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import Snapshot

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Parameters of a division; `Goodput` documents them.

    `urgency` is what an objective makes of some trials: it multiplies what a speed-up is worth, 1 for others.
    Unlike a weight it leaves the fair shares, which speed-ups and the guarantee are measured by, as they are.
    """

    guarantee: float
    min_gain: float
    cooldown_s: float
    quantum: float
    urgency: Mapping[TrialId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """One trial's share, why, and what stopped it from being larger ('none' if nothing but the others' gain)."""

    share: float
    reason: str
    binding: str


def divide(snapshot: Snapshot, fitted_trials: tuple[FittedTrial, ...], rules: Rules) -> dict[TrialId, Granted]:
    """The share of every trial.

    Groups of trials that share devices are divided apart. A group is divided anew when trials came, went or resumed;
    otherwise only if the gain reaches `min_gain`, and only among trials whose cooldown is over.
    """
    by_id = {fitted.trial_id: fitted for fitted in fitted_trials}
    claims = [claim_of(s, weight=s.trial.weight, max_share=s.trial.limits.max_share) for s in fitted_trials]
    room = make_room(fitted_trials, claims, rules.cooldown_s)
    freed: set[DeviceId] = set()
    for allocation in snapshot.plan.allocations:
        if allocation.trial_id not in by_id:
            freed.update(allocation.placement)
    granted = {
        trial_id: Granted(share=0.0, reason=f"share 0: {reason}", binding="paused")
        for trial_id, reason in room.resting.items()
    }
    for group in components(room.claims):
        fair = fill(group)
        if _is_forced(group, by_id, freed):
            granted |= _anew(group, by_id, fair, rules)
        else:
            granted |= _rebalanced(group, by_id, fair, rules)
    return granted


def _is_forced(group: tuple[Claim, ...], by_id: Mapping[TrialId, FittedTrial], freed: set[DeviceId]) -> bool:
    """Whether the shares in force cannot stay, or a departure left something to divide."""
    shares: dict[TrialId, float] = {}
    for claim in group:
        old = by_id[claim.trial_id].in_force
        if old is None or not claim.min_share - _EPSILON <= old.share <= claim.max_share + _EPSILON:
            return True
        shares[claim.trial_id] = old.share
    return not fits(group, shares) or any(not freed.isdisjoint(claim.placement) for claim in group)


def _anew(
    group: tuple[Claim, ...], by_id: Mapping[TrialId, FittedTrial], fair: Mapping[TrialId, float], rules: Rules
) -> dict[TrialId, Granted]:
    """Everyone begins at the guaranteed minimum and climbs; who was never measured gets the fair share."""
    floor, open_claims = {}, []
    for claim in group:
        trial_id = claim.trial_id
        if by_id[trial_id].is_measured:
            floor[trial_id] = max(claim.min_share, rules.guarantee * fair[trial_id])
            open_claims.append(claim)
        else:
            floor[trial_id] = fair[trial_id]
            open_claims.append(dataclasses.replace(claim, max_share=fair[trial_id]))
    target = climb(open_claims, floor, _utility(by_id, fair, rules), rules.quantum)
    return {claim.trial_id: _explain(claim, by_id[claim.trial_id], target, fair) for claim in group}


def _rebalanced(
    group: tuple[Claim, ...], by_id: Mapping[TrialId, FittedTrial], fair: Mapping[TrialId, float], rules: Rules
) -> dict[TrialId, Granted]:
    """The shares in force, or a better division among those who are free to change."""
    now = {claim.trial_id: by_id[claim.trial_id].settings.share for claim in group}
    floor, open_claims, num_free = {}, [], 0
    for claim in group:
        trial_id, fitted = claim.trial_id, by_id[claim.trial_id]
        is_free = fitted.is_measured and not fitted.is_pinned and fitted.age_s >= rules.cooldown_s
        guaranteed = max(claim.min_share, rules.guarantee * fair[trial_id])
        floor[trial_id] = min(now[trial_id], guaranteed) if is_free else now[trial_id]
        open_claims.append(claim if is_free else dataclasses.replace(claim, max_share=now[trial_id]))
        num_free += is_free
    if not num_free:
        why = f"none of the {len(group)} trials on its devices is free to change"
        return {c.trial_id: _kept(c, by_id[c.trial_id], now, why) for c in group}
    utility = _utility(by_id, fair, rules)
    target = climb(open_claims, floor, utility, rules.quantum)
    before = sum(c.weight * utility(c.trial_id, now[c.trial_id]) for c in group)
    gain = sum(c.weight * utility(c.trial_id, target[c.trial_id]) for c in group) / before - 1
    if gain < rules.min_gain:
        why = f"a new division would gain {max(0.0, gain):.1%}, less than {rules.min_gain:.1%}"
        return {c.trial_id: _kept(c, by_id[c.trial_id], now, why) for c in group}
    return {c.trial_id: _explain(c, by_id[c.trial_id], target, fair) for c in group}


def _utility(
    by_id: Mapping[TrialId, FittedTrial], fair: Mapping[TrialId, float], rules: Rules
) -> Callable[[TrialId, float], float]:
    urgency = rules.urgency
    return lambda trial_id, share: urgency.get(trial_id, 1.0) * by_id[trial_id].speedup(share, fair[trial_id])


def _explain(
    claim: Claim, fitted: FittedTrial, shares: Mapping[TrialId, float], fair: Mapping[TrialId, float]
) -> Granted:
    """The reason of a share that was chosen anew."""
    share, fair_share = shares[claim.trial_id], fair[claim.trial_id]
    text = f"share {share:.3f} of {claim.placement[0]}"
    limits = fitted.trial.limits
    if fitted.is_pinned:
        return Granted(share=share, reason=f"{text} while its telemetry is stale", binding="stale")
    if not fitted.is_measured:
        return Granted(share=share, reason=f"{text}, the fair one until its speed is measured", binding="unmeasured")
    speedup = fitted.speedup(share, fair_share)
    binding = {limits.max_share: "max_share", limits.min_share: "min_share"}.get(share, "device")
    response = f"speed grows as cores^{fitted.model.exponent:.2f}"
    reason = f"{text} (fair {fair_share:.3f}, speed-up {speedup:.2f}; {response})"
    return Granted(share=share, reason=reason, binding=binding)


def _kept(claim: Claim, fitted: FittedTrial, shares: Mapping[TrialId, float], why: str) -> Granted:
    """The reason of a share that stays."""
    share = shares[claim.trial_id]
    binding = "stale" if fitted.is_pinned else "hysteresis"
    return Granted(share=share, reason=f"share {share:.3f} of {claim.placement[0]} kept: {why}", binding=binding)
