"""Movable trials that try a tier nobody of their shape has measured: who, which one, and how long.

One running trial of a shape at a time, one tier at a time, turned live where it is: size, seats and batch stay, so that
what it brings can be told and nothing restarts. It keeps the tier until it is measured; then the tier is weighed like
every other. Never a tier that the trial fled from or that is predicted not to fit, and never one of a trial with a
guard, which probes its tiers itself and knows those that are emulated. Called by `policies.goodput_joint` on the rows
it would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from orchestrator.policies.batch import most_micro_batch
from orchestrator.policies.fleet import Fleet
from orchestrator.policies.memory import fits
from orchestrator.policies.movable import Mover, run
from orchestrator.policies.plan import Allocation
from orchestrator.policies.prospects import Prospect, usable_tiers
from orchestrator.policies.tier import Tier, is_cheaper, tier_facts

Case = tuple[Mover, Prospect]


def with_trials_of_tiers(
    cases: Sequence[Case], rows: Sequence[Allocation], fleet: Fleet, cooldown_s: float
) -> list[Allocation]:
    """The rows, with a tier tried or held by at most one trial of each shape; the same rows where none is to be tried.

    Args:
        cases: the movable trials with their prospects.
        rows: what each would get, in the same order.
        fleet: what their seats point into.
        cooldown_s: seconds after its last change before a trial tries anything.
    """
    found = list(rows)
    trying: dict[str, int] = {}
    for position, ((mover, outlook), row) in enumerate(zip(cases, rows, strict=True)):
        if _is_trying(mover, outlook, row):
            trying.setdefault(mover.trial.shape, position)
    for shape, position in trying.items():
        mover = cases[position][0]
        assert mover.in_force is not None
        reason = f"explores tier {mover.in_force.tier.value} until it is measured for {shape}"
        found[position] = _turned(mover, fleet, mover.in_force.tier, reason)
    chosen: dict[str, tuple[int, Tier]] = {}
    # Those with the most observations first: they are the ones whose fits are pooled.
    order = sorted(range(len(cases)), key=lambda i: (-cases[i][0].trial.fit.num_observations, cases[i][0].trial_id))
    for position in order:
        mover, outlook = cases[position]
        if mover.trial.shape in trying or mover.trial.shape in chosen:
            continue
        tier = _next_tier(mover, outlook, rows[position], cooldown_s)
        if tier is not None:
            chosen[mover.trial.shape] = (position, tier)
    for position, tier in chosen.values():
        reason = f"explores tier {tier.value}, not yet measured for {cases[position][0].trial.shape}"
        found[position] = _turned(cases[position][0], fleet, tier, reason)
    return found


def _turned(mover: Mover, fleet: Fleet, tier: Tier, reason: str) -> Allocation:
    assert mover.in_force is not None
    settings = dataclasses.replace(mover.in_force, tier=tier)
    return run(mover, fleet, mover.seats, settings, reason, binding="exploring")


def _is_free(mover: Mover, outlook: Prospect) -> bool:
    """Whether its tier may be chosen for knowledge at all: it runs, its shape is known, and it has no guard."""
    has_choice = len(mover.trial.limits.tiers) > 1 and not mover.trial.fit.tiers
    return has_choice and bool(mover.seats) and not (mover.is_pinned or outlook.is_prior)


def _stays(mover: Mover, row: Allocation) -> bool:
    """Whether it would keep its ranks, devices and share, and what it has is within its limits."""
    old, limits = mover.in_force, mover.trial.limits
    if old is None or row.placement != mover.trial.placement:
        return False
    is_legal = (
        limits.min_global_batch <= old.global_batch <= limits.max_global_batch
        and old.micro_batch <= most_micro_batch(limits, mover.trial.fit.micro_batch_cap)
        and limits.min_share <= old.share <= limits.max_share
    )
    return is_legal and (row.settings.num_workers, row.settings.share) == (old.num_workers, old.share)


def _is_trying(mover: Mover, outlook: Prospect, row: Allocation) -> bool:
    """Whether it runs in a tier that it may use and that is still unmeasured, and would otherwise leave it."""
    if not _is_free(mover, outlook) or not _stays(mover, row):
        return False
    assert mover.in_force is not None
    tier = mover.in_force.tier
    return tier in usable_tiers(mover) and tier not in outlook.measured_tiers


def _next_tier(mover: Mover, outlook: Prospect, row: Allocation, cooldown_s: float) -> Tier | None:
    """The dearest unmeasured tier below the present one that fits, if the trial would change nothing else."""
    if not _is_free(mover, outlook) or mover.age_s < cooldown_s or mover.trial.override is not None:
        return None
    if not _stays(mover, row) or row.settings != mover.in_force:
        return None
    measured = outlook.measured_tiers
    if row.settings.tier not in measured:
        return None
    trial, now = mover.trial, row.settings
    cheaper = [
        tier
        for tier in usable_tiers(mover)
        if is_cheaper(tier, now.tier)
        and tier not in measured
        and fits(trial.fit.memory, tier, now.num_workers, now.micro_batch, trial.memory_limit_bytes)
    ]
    return min(cheaper, key=lambda tier: tier_facts(tier).cost_rank, default=None)
