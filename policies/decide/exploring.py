"""Movable trials that try a tier nobody of their shape has measured: who, which one, and how long.

One running trial of a shape at a time, one tier at a time, turned live where it is: size, seats and batch stay, so that
what it brings can be told and nothing restarts. It keeps the tier until it is measured; then the tier is weighed like
every other. Never a tier that the trial fled from or that is predicted not to fit, and never one of a trial with a
guard, which probes its tiers itself and knows those that are emulated. Called by `policies.decide.goodput_joint` on the
rows it would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from orchestrator.policies.decide.batch import most_micro_batch
from orchestrator.policies.decide.candidates import Candidate, run
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.goodput_table import GoodputTable, usable_tiers
from orchestrator.policies.learn.memory import fits
from orchestrator.policies.plan import Allocation
from orchestrator.policies.tier import Tier, is_cheaper, tier_facts

Case = tuple[Candidate, GoodputTable]


def with_trials_of_tiers(
    cases: Sequence[Case], rows: Sequence[Allocation], fleet: Fleet, cooldown_s: float
) -> list[Allocation]:
    """The rows, with a tier tried or held by at most one trial of each shape; the same rows where none is to be tried.

    Args:
        cases: the trials that may be placed, with what each makes of every size.
        rows: what each would get, in the same order.
        fleet: what their seats point into.
        cooldown_s: seconds after its last change before a trial tries anything.
    """
    found = list(rows)
    trying: dict[str, int] = {}
    for position, ((candidate, table), row) in enumerate(zip(cases, rows, strict=True)):
        if _is_trying(candidate, table, row):
            trying.setdefault(candidate.trial.shape, position)
    for shape, position in trying.items():
        candidate = cases[position][0]
        assert candidate.in_force is not None
        reason = f"explores tier {candidate.in_force.tier.value} until it is measured for {shape}"
        found[position] = _turned(candidate, fleet, candidate.in_force.tier, reason)
    chosen: dict[str, tuple[int, Tier]] = {}
    # Those with the most observations first: they are the ones whose fits are pooled.
    order = sorted(range(len(cases)), key=lambda i: (-cases[i][0].trial.fit.num_observations, cases[i][0].trial_id))
    for position in order:
        candidate, table = cases[position]
        if candidate.trial.shape in trying or candidate.trial.shape in chosen:
            continue
        tier = _next_tier(candidate, table, rows[position], cooldown_s)
        if tier is not None:
            chosen[candidate.trial.shape] = (position, tier)
    for position, tier in chosen.values():
        reason = f"explores tier {tier.value}, not yet measured for {cases[position][0].trial.shape}"
        found[position] = _turned(cases[position][0], fleet, tier, reason)
    return found


def _turned(candidate: Candidate, fleet: Fleet, tier: Tier, reason: str) -> Allocation:
    assert candidate.in_force is not None
    settings = dataclasses.replace(candidate.in_force, tier=tier)
    return run(candidate, fleet, candidate.seats, settings, reason, binding="exploring")


def _is_free(candidate: Candidate, table: GoodputTable) -> bool:
    """Whether its tier may be chosen for knowledge at all: it runs, its shape is known, and it has no guard."""
    has_choice = len(candidate.trial.limits.tiers) > 1 and not candidate.trial.fit.tiers
    return has_choice and bool(candidate.seats) and not (candidate.is_pinned or table.is_prior)


def _stays(candidate: Candidate, row: Allocation) -> bool:
    """Whether it would keep its ranks, devices and share, and what it has is within its limits."""
    old, limits = candidate.in_force, candidate.trial.limits
    if old is None or row.placement != candidate.trial.placement:
        return False
    is_legal = (
        limits.min_global_batch <= old.global_batch <= limits.max_global_batch
        and old.micro_batch <= most_micro_batch(limits, candidate.trial.fit.micro_batch_cap)
        and limits.min_share <= old.share <= limits.max_share
    )
    return is_legal and (row.settings.num_workers, row.settings.share) == (old.num_workers, old.share)


def _is_trying(candidate: Candidate, table: GoodputTable, row: Allocation) -> bool:
    """Whether it runs in a tier that it may use and that is still unmeasured, and would otherwise leave it."""
    if not _is_free(candidate, table) or not _stays(candidate, row):
        return False
    assert candidate.in_force is not None
    tier = candidate.in_force.tier
    return tier in usable_tiers(candidate) and tier not in table.measured_tiers


def _next_tier(candidate: Candidate, table: GoodputTable, row: Allocation, cooldown_s: float) -> Tier | None:
    """The dearest unmeasured tier below the present one that fits, if the trial would change nothing else."""
    if not _is_free(candidate, table) or candidate.age_s < cooldown_s or candidate.trial.override is not None:
        return None
    if not _stays(candidate, row) or row.settings != candidate.in_force:
        return None
    measured = table.measured_tiers
    if row.settings.tier not in measured:
        return None
    trial, now = candidate.trial, row.settings
    cheaper = [
        tier
        for tier in usable_tiers(candidate)
        if is_cheaper(tier, now.tier)
        and tier not in measured
        and fits(trial.fit.memory, tier, now.num_workers, now.micro_batch, trial.memory_limit_bytes)
    ]
    return min(cheaper, key=lambda tier: tier_facts(tier).cost_rank, default=None)
