"""Several runs under one policy: their trials in one snapshot, decided together, and each run's part of the plan. Pure.

Every run has a prefix, `r1/`, by which its trials are told from those of others. What a snapshot says of a trial names
neither user nor parameters: runs that share a cluster call shapes and users by checksums (`RunSpec.prefix`). So each
run's journal can hold the whole decision, which `verify` takes again, and what it holds of others does not name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.policies.plan import Allocation, Generation, Plan, TrialId
from orchestrator.policies.snapshot import Quota, Snapshot, TrialView


def joined(parts: Mapping[str, Snapshot], plans: Mapping[str, Plan], quotas: Sequence[Quota] = ()) -> Snapshot:
    """What several runs see, as one world. They have one clock, and no nodes to ask for.

    Args:
        parts: what each sees, by the prefix of its trials; those without a trial see nothing.
        plans: what is in force of each, also of those: a policy sees by it which trials have gone.
        quotas: those of the cluster. Of several quotas of a user the smallest counts.
    """
    ordered = [(prefix, parts[prefix]) for prefix in sorted(parts)]
    devices = {device.device_id: device for _, part in ordered for device in part.devices}
    most: dict[str, float] = {}
    for quota in (*quotas, *(each for _, part in ordered for each in part.quotas)):
        most[quota.user] = min(quota.max_devices, most.get(quota.user, quota.max_devices))
    return Snapshot(
        now_s=max(part.now_s for _, part in ordered),
        seed=ordered[0][1].seed,
        plan=in_force(plans),
        devices=tuple(devices[key] for key in sorted(devices)),
        trials=_sorted_views([_named(prefix, view) for prefix, part in ordered for view in part.trials]),
        quotas=tuple(Quota(user=user, max_devices=limit) for user, limit in sorted(most.items())),
    )


def in_force(plans: Mapping[str, Plan]) -> Plan:
    """The plans in force of several runs, as one; its generation is the newest."""
    rows = [replace(row, trial_id=_name(prefix, row.trial_id)) for prefix in plans for row in plans[prefix].allocations]
    return Plan(
        generation=Generation(max(plan.generation for plan in plans.values())),
        allocations=_sorted_rows(rows),
        reason="what is in force of all runs",
    )


def part_of(plan: Plan, prefix: str) -> Plan:
    """A run's part of a plan for all, with the names that its trials have there."""
    rows = [_own(row, prefix) for row in plan.allocations if row.trial_id.startswith(prefix)]
    return replace(plan, allocations=_sorted_rows(rows))


def seen_from(plan: Plan, prefix: str) -> Plan:
    """The plan for all as one run sees it: its own trials by their names, those of others by their prefixed ones."""
    rows = [_own(row, prefix) if row.trial_id.startswith(prefix) else row for row in plan.allocations]
    return replace(plan, allocations=_sorted_rows(rows))


def parts_of(snapshot: Snapshot, plan: Plan, prefix: str) -> tuple[Snapshot, Plan, Plan]:
    """A run's part of a decision for all, and the whole plan as it sees it; without a prefix it is its own."""
    if not prefix:
        return snapshot, plan, plan
    views = [view for view in snapshot.trials if view.trial_id.startswith(prefix)]
    named = [replace(view, trial_id=_stripped(view.trial_id, prefix)) for view in views]
    own = replace(snapshot, plan=part_of(snapshot.plan, prefix), trials=_sorted_views(named))
    return own, part_of(plan, prefix), seen_from(plan, prefix)


def _named(prefix: str, view: TrialView) -> TrialView:
    return replace(view, trial_id=_name(prefix, view.trial_id))


def _own(row: Allocation, prefix: str) -> Allocation:
    return replace(row, trial_id=_stripped(row.trial_id, prefix))


def _name(prefix: str, trial_id: TrialId) -> TrialId:
    return TrialId(f"{prefix}{trial_id}")


def _stripped(trial_id: TrialId, prefix: str) -> TrialId:
    return TrialId(trial_id.removeprefix(prefix))


def _sorted_rows(rows: list[Allocation]) -> tuple[Allocation, ...]:
    return tuple(sorted(rows, key=lambda row: row.trial_id))


def _sorted_views(views: list[TrialView]) -> tuple[TrialView, ...]:
    return tuple(sorted(views, key=lambda view: view.trial_id))
