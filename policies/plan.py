"""What a policy decides: a `Plan` of one `Allocation` per trial, and the differences between two plans.

Plans are values. They do not know how they are enforced, offered or acknowledged; the ledger does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

from orchestrator.policies.tier import Tier

TrialId = NewType("TrialId", str)
DeviceId = NewType("DeviceId", str)
Generation = NewType("Generation", int)


SPARSE: Mapping[str, bool] = {"sparse": True}
"""Metadata of a field that `policies.codec` leaves out while it has its default, so that old journals stay the same."""


class Effect(StrEnum):
    """How much an allocation disturbs the trial when it is applied."""

    NONE = "none"
    STEP = "step"
    RESTART = "restart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The dials of one trial.

    Attributes:
        share: fraction of one device granted to *each* rank, in (0, 1]; 0 pauses the trial at its boundary.
        micro_batch: samples per rank per forward, >= 1.
        grad_accum: micro-batches per step and rank, >= 1.
        tier: precision tier of the matrix products.
        num_workers: ranks, >= 1.
    """

    share: float
    micro_batch: int
    grad_accum: int
    tier: Tier
    num_workers: int

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro_batch * self.grad_accum * self.num_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Other settings the policy weighed, with the goodput it predicted (samples/s; None where it could not)."""

    settings: Settings
    goodput: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One trial's part of a plan.

    Attributes:
        trial_id: the trial.
        settings: the dials.
        placement: the device of each rank, in rank order; its length is `settings.num_workers`. Empty for a trial that
            waits without holding any device, which only one that may move can do (share 0 then).
        effect: what applying it takes, relative to the plan in force.
        reason: one sentence with numbers.
        binding: the constraint that stopped the policy from going further, one or two words.
        predicted_goodput: samples/s of useful progress expected, None where nothing is measured yet.
        predicted_gain: predicted goodput over that of the settings in force, minus one; None where unknown.
        alternatives: at most eight other settings that were weighed.
        cost_s: seconds of the trial's time that the change was predicted to cost.
        resize_to: ranks with which the trial shall go on in another worker group, None to stay in the one it has. Until
            that group is there the trial runs on under `settings`; a later plan that does not repeat it calls it off.
    """

    trial_id: TrialId
    settings: Settings
    placement: tuple[DeviceId, ...]
    effect: Effect
    reason: str
    binding: str = "none"
    predicted_goodput: float | None = None
    predicted_gain: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    cost_s: float = field(default=0.0, metadata=SPARSE)
    resize_to: int | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWish:
    """How many nodes of one type the cluster should have.

    Attributes:
        node_type: its name, as in `Snapshot.node_types`.
        num_nodes: nodes that are worth their price, those that are there among them.
        cost_per_hour: what they cost together.
        reason: one sentence with numbers.
        since_s: when the number last changed, on the snapshot's clock.
        grows: whether it last rose.
    """

    node_type: str
    num_nodes: int
    cost_per_hour: float
    reason: str
    since_s: float
    grows: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Allocations of all running trials, sorted by trial id, with the plan's monotonic number.

    `nodes` has a wish for every type of node that can be had, in their order; it is empty where nobody can be asked for
    any, or the policy leaves that alone.
    """

    generation: Generation
    allocations: tuple[Allocation, ...]
    reason: str
    nodes: tuple[NodeWish, ...] = field(default=(), metadata=SPARSE)

    def allocation(self, trial_id: TrialId) -> Allocation | None:
        """The trial's allocation, or None where the plan has none."""
        return next((a for a in self.allocations if a.trial_id == trial_id), None)


EMPTY_PLAN = Plan(generation=Generation(0), allocations=(), reason="nothing runs yet")


def effect_of(old: Settings | None, new: Settings, *, moves: bool = False) -> Effect:
    """What it takes to go from `old` to `new`: world size needs a restart, every other dial a step boundary.

    `moves` says that the placement differs from the trial's own, which needs a restart too: leaving all devices, coming
    back to some, or other devices than before.
    """
    if old is None or (old == new and not moves):
        return Effect.NONE
    if old.num_workers != new.num_workers or moves:
        return Effect.RESTART
    return Effect.STEP


def can_split(settings: Settings, num_workers: int) -> bool:
    """Whether the global batch can be kept, to the sample, on that many ranks."""
    return num_workers >= 1 and settings.global_batch % num_workers == 0


def on_ranks(settings: Settings, num_workers: int, max_micro_batch: int) -> Settings:
    """The same global batch and tier on another number of ranks, with as little accumulation as the micro-batch allows.

    >>> one = Settings(share=1.0, micro_batch=16, grad_accum=1, tier=Tier.FP32, num_workers=1)
    >>> four = on_ranks(one, 4, max_micro_batch=2)
    >>> four.micro_batch, four.grad_accum, four.num_workers
    (2, 2, 4)

    Raises:
        ValueError: the global batch does not divide by that number.
    """
    if num_workers == settings.num_workers:
        return settings
    if not can_split(settings, num_workers):
        raise ValueError(
            f"num_workers={num_workers} cannot keep a global batch of {settings.global_batch}; allowed: a divisor of it"
        )
    per_rank = settings.global_batch // num_workers
    most = max(1, max_micro_batch)
    grad_accum = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= most)
    return replace(settings, num_workers=num_workers, micro_batch=per_rank // grad_accum, grad_accum=grad_accum)


def changed_dials(old: Settings, new: Settings) -> tuple[str, ...]:
    """Names of the dials that differ: 'share', 'batch', 'precision', 'workers', in that order."""
    dials = (
        ("share", old.share != new.share),
        ("batch", (old.micro_batch, old.grad_accum) != (new.micro_batch, new.grad_accum)),
        ("precision", old.tier != new.tier),
        ("workers", old.num_workers != new.num_workers),
    )
    return tuple(name for name, differs in dials if differs)


def diff(old: Plan, new: Plan) -> tuple[Allocation, ...]:
    """Allocations of `new` that grant something else than `old`, including trials `old` does not have."""
    changed = []
    for allocation in new.allocations:
        before = old.allocation(allocation.trial_id)
        if before is None or _granted(before) != _granted(allocation):
            changed.append(allocation)
    return tuple(changed)


def _granted(allocation: Allocation) -> tuple[object, ...]:
    """What of an allocation is more than an explanation."""
    return allocation.settings, allocation.placement, allocation.resize_to


def numbers(nodes: tuple[NodeWish, ...]) -> dict[str, int]:
    """Nodes wished for, by type."""
    return {wish.node_type: wish.num_nodes for wish in nodes}


def is_same(old: Plan, new: Plan) -> bool:
    """Whether two plans grant the same to the same trials and want the same nodes, whatever their reasons.

    A plan without wishes wants what is wanted already.
    """
    if new.nodes and numbers(old.nodes) != numbers(new.nodes):
        return False
    return not diff(old, new) and {a.trial_id for a in old.allocations} == {a.trial_id for a in new.allocations}
