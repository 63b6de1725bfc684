"""Trials whose devices a policy may choose: what each holds, and the rows of a plan for them.

`split` separates them from the trials that cannot move, which every policy decides on their own, as a snapshot of
their own. A candidate is never put on a device that such a trial uses. Nothing is chosen here, except which candidates
have to stay: `is_pinned`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from orchestrator.policies.decide.batch import most_micro_batch
from orchestrator.policies.decide.fleet import Fleet, Seats
from orchestrator.policies.plan import Allocation, DeviceId, Effect, Settings, TrialId, effect_of
from orchestrator.policies.snapshot import Snapshot, TrialView

RESTART_S = 30.0
"""What a restart is assumed to cost a trial that was never restarted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One trial whose devices a policy may choose.

    Attributes:
        trial: the trial.
        in_force: its settings in force, None for a trial new to the plan.
        seats: the devices it runs on, empty where it holds none or one of them is gone.
        is_pinned: whether it has to keep what it has: protected, guaranteed, stale, or not to be paused.
        age_s: seconds since its settings last changed.
    """

    trial: TrialView
    in_force: Settings | None
    seats: Seats
    is_pinned: bool
    age_s: float

    @property
    def trial_id(self) -> TrialId:
        """The trial's id."""
        return self.trial.trial_id

    @property
    def share(self) -> float:
        """The share in force on its seats, 0 without any."""
        return self.in_force.share if self.seats and self.in_force is not None else 0.0

    @property
    def wish(self) -> Settings:
        """What its user would run it with, its ranks within the limits."""
        wanted = self.trial.requested or self.trial.start
        low, high = worker_range(self.trial)
        return dataclasses.replace(wanted, num_workers=min(high, max(low, wanted.num_workers)))

    @property
    def restart_s(self) -> float:
        """What a restart costs it, in seconds."""
        return restart_cost_s(self.trial)


def restart_cost_s(trial: TrialView) -> float:
    """What a restart costs a trial, in seconds: as measured, or as assumed until then."""
    return RESTART_S if trial.restart_s is None else trial.restart_s


def worker_range(trial: TrialView) -> tuple[int, int]:
    """The fewest and most ranks that a policy may give it; never fewer than reach its smallest batch."""
    limits = trial.limits
    low = limits.min_workers or trial.start.num_workers
    if limits.max_grad_accum is not None:
        low = max(low, math.ceil(limits.min_global_batch / (limits.max_micro_batch * limits.max_grad_accum)))
    return low, max(low, limits.max_workers or trial.start.num_workers)


def split(snapshot: Snapshot) -> tuple[Snapshot, tuple[Candidate, ...], Fleet]:
    """The snapshot of the trials that cannot move, the movable ones sorted by id, and the devices left to them."""
    fixed = tuple(trial for trial in snapshot.trials if not trial.limits.can_move)
    if len(fixed) == len(snapshot.trials):
        return snapshot, (), Fleet(())
    gone = {trial.trial_id for trial in snapshot.trials} - {trial.trial_id for trial in fixed}
    rows = tuple(row for row in snapshot.plan.allocations if row.trial_id not in gone)
    rest = dataclasses.replace(
        snapshot, trials=fixed, plan=dataclasses.replace(snapshot.plan, allocations=rows), quotas=()
    )
    taken = {device_id for trial in fixed for device_id in trial.placement}
    fleet = Fleet(device for device in snapshot.devices if device.device_id not in taken)
    in_force = {row.trial_id: row.settings for row in snapshot.plan.allocations}
    candidates = []
    for trial in sorted((t for t in snapshot.trials if t.limits.can_move), key=lambda t: t.trial_id):
        old = in_force.get(trial.trial_id) if trial.override is None else trial.override.settings
        seats = fleet.seats(trial.placement) if old is not None and old.share > 0 else None
        candidates.append(
            Candidate(
                trial=trial,
                in_force=old,
                seats=seats or (),
                is_pinned=bool(seats) and _must_stay(trial),
                age_s=snapshot.now_s - trial.changed_at_s,
            )
        )
    return rest, tuple(candidates), fleet


def _must_stay(trial: TrialView) -> bool:
    return trial.is_protected or trial.guaranteed > 0 or trial.is_stale or not trial.limits.can_pause


class Budget:
    """Devices that users may still be given; a user without a quota has no end of them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._left = {quota.user: quota.max_devices for quota in snapshot.quotas}
        if not self._left:
            return
        fixed = {trial.trial_id: trial for trial in snapshot.trials if not trial.limits.can_move}
        for row in snapshot.plan.allocations:
            if row.trial_id in fixed:
                self.take(fixed[row.trial_id], row.settings.share * len(row.placement))

    def allows(self, trial: TrialView, devices: float) -> bool:
        """Whether the trial's user may have that many more."""
        return self.left(trial.user) >= devices - 1e-9

    def left(self, user: str) -> float:
        """Devices that a user may still be given."""
        return self._left.get(user, math.inf)

    def take(self, trial: TrialView, devices: float) -> None:
        """Charge the trial's user; a negative number gives back."""
        if trial.user in self._left:
            self._left[trial.user] -= devices


def split_batch(trial: TrialView, global_batch: int, workers: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of that many ranks, the global batch kept in its limits and as it divides.

    Where accumulation is limited the batch is the largest that the ranks reach with it.
    """
    limits = trial.limits
    global_batch = min(limits.max_global_batch, max(limits.min_global_batch, global_batch))
    largest = most_micro_batch(limits, trial.fit.micro_batch_cap)
    per_rank = max(1, math.ceil(global_batch / workers - 1e-9))
    grad_accum = math.ceil(per_rank / largest)
    if workers == 1 and global_batch > trial.start.global_batch:
        grad_accum = max(grad_accum, limits.min_grad_accum_alone)
    if limits.max_grad_accum is not None and grad_accum > limits.max_grad_accum:
        grad_accum = limits.max_grad_accum
        per_rank = min(per_rank, grad_accum * largest)
    micro_batch = math.ceil(per_rank / grad_accum)
    if micro_batch * grad_accum * workers > limits.max_global_batch and micro_batch > 1:
        lower = (micro_batch - 1) * grad_accum * workers
        if lower >= limits.min_global_batch:
            micro_batch -= 1
    return micro_batch, grad_accum


def wait(candidate: Candidate, reason: str, binding: str = "devices") -> Allocation:
    """The row of a trial that holds no device now."""
    settings = dataclasses.replace(candidate.in_force or candidate.trial.start, share=0.0)
    return _row(candidate, settings, (), reason, binding)


def keep(candidate: Candidate, fleet: Fleet, reason: str, binding: str) -> Allocation:
    """The row of a trial that keeps everything it has."""
    assert candidate.in_force is not None
    return _row(candidate, candidate.in_force, fleet.placement(candidate.seats), reason, binding)


def run(
    candidate: Candidate,
    fleet: Fleet,
    seats: Seats,
    settings: Settings,
    reason: str,
    *,
    binding: str = "devices",
    predicted: float | None = None,
) -> Allocation:
    """The row of a trial on these devices.

    Args:
        candidate: the trial.
        fleet: what `seats` point into.
        seats: one device per rank; the order of the present placement is kept where the devices are the same.
        settings: the dials; the number of ranks is taken from the seats.
        reason: one sentence with numbers.
        binding: what stopped the policy from going further.
        predicted: its goodput there, in samples/s.
    """
    if set(seats) == set(candidate.seats):
        seats = candidate.seats
    settings = dataclasses.replace(settings, num_workers=len(seats))
    row = _row(candidate, settings, fleet.placement(seats), reason, binding)
    cost_s = candidate.restart_s if row.effect is Effect.RESTART else 0.0
    return dataclasses.replace(row, predicted_goodput=predicted, cost_s=cost_s)


def _row(
    candidate: Candidate, settings: Settings, placement: tuple[DeviceId, ...], reason: str, binding: str
) -> Allocation:
    return Allocation(
        trial_id=candidate.trial_id,
        settings=settings,
        placement=placement,
        effect=effect_of(candidate.in_force, settings, moves=placement != candidate.trial.placement),
        reason=reason,
        binding=binding,
    )
