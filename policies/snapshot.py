"""All a policy may know, at one instant: devices, trials, what is fitted about them, the plan in force.

Built by the controller from live telemetry, by the simulator from a trace, or by hand; a policy cannot tell which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.plan import SPARSE, DeviceId, Plan, Settings, TrialId
from orchestrator.policies.tier import Tier


class DeviceKind(StrEnum):
    """What a device is; decides how a share of it is counted for people (cores, SM groups)."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """One device.

    Attributes:
        device_id, node_id: its name, and the host it is in.
        kind: what it is.
        units: what a share is cut from: cores of a CPU node, SM groups of a GPU.
        device_type: its model, such as 'h200'; speeds measured on one type are not those of another. May be empty.
        speed: how fast the type is assumed to be relative to others until it was measured.
        memory_bytes: its memory, 0 where not known.
        price_per_s: what it costs while a trial holds it; 0 where nobody pays.
    """

    device_id: DeviceId
    node_id: str
    kind: DeviceKind
    units: int
    device_type: str = field(default="", metadata=SPARSE)
    speed: float = field(default=1.0, metadata=SPARSE)
    memory_bytes: int = field(default=0, metadata=SPARSE)
    price_per_s: float = field(default=0.0, metadata=SPARSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DialLimits:
    """The ranges within which a policy may turn the dials of a trial. Equal bounds (or one tier) mean a fixed dial.

    Attributes:
        min_share: smallest share per rank, > 0.
        max_share: largest share per rank, <= 1.
        min_global_batch: samples per step; equal to `max_global_batch` where the user keeps the batch fixed.
        max_global_batch: samples per step.
        max_micro_batch: samples per rank per forward.
        tiers: allowed tiers, dearest first.
        can_pause: whether share 0 is allowed.
        can_move: whether a policy may choose the trial's devices. It then may also wait without any (share 0, an empty
            placement), but a running one only gives up all its devices if `can_pause`.
        min_workers, max_workers: ranks the policy may choose; None for `start.num_workers`. It chooses by the placement
            of a trial that can move, by `Allocation.resize_to` for another.
        min_micro_batch: samples per rank per forward that a policy that chooses ranks should keep; not enforced.
        min_efficiency: the least that a sample may be worth at a batch above that of the start; not enforced, since the
            noise scale on which it depends moves by itself. 0 for no such limit.
        max_grad_accum: most micro-batches per step, 1 for no accumulation; None for no limit. A trial then has as many
            ranks at least as reach `min_global_batch` with it.
        min_grad_accum_alone: fewest micro-batches per step of a single rank at a batch above that of the start; 2 where
            the noise scale is told from the micro-batches of a step, as in AdaptDL. For policies that choose ranks; not
            enforced.
    """

    min_share: float
    max_share: float
    min_global_batch: int
    max_global_batch: int
    max_micro_batch: int
    tiers: tuple[Tier, ...]
    can_pause: bool = False
    can_move: bool = field(default=False, metadata=SPARSE)
    min_workers: int | None = field(default=None, metadata=SPARSE)
    max_workers: int | None = field(default=None, metadata=SPARSE)
    min_micro_batch: int = field(default=1, metadata=SPARSE)
    min_efficiency: float = field(default=0.0, metadata=SPARSE)
    max_grad_accum: int | None = field(default=None, metadata=SPARSE)
    min_grad_accum_alone: int = field(default=1, metadata=SPARSE)

    @property
    def can_resize(self) -> bool:
        """Whether a policy may ask for another worker group, of another number of ranks."""
        return not self.can_move and (self.min_workers is not None or self.max_workers is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A protective move a trial made by itself inside its envelope, as the ledger recorded it."""

    number: int
    generation: int
    settings: Settings
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModeView:
    """How the steps of a trial are executed with some dials, as it measured.

    Attributes:
        tier, micro_batch, grad_accum: the dials.
        is_replayed: whether they are replayed from a graph; the faster mode is taken, at every share.
        eager_s, replayed_s: measured seconds per step in either mode.
    """

    tier: Tier
    micro_batch: int
    grad_accum: int
    is_replayed: bool
    eager_s: float
    replayed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialView:
    """One trial that holds a worker group, as the policy sees it.

    Attributes:
        trial_id: the trial.
        shape: key of everything that fixes its speed apart from the dials (job, model size); trials of one shape
            share what is measured.
        start: the user's settings, with which the trial began; `start.global_batch` is the base of efficiency.
        limits: the ranges of the dials.
        placement: the device of each rank; fixed while its worker group lives, unless `limits.can_move`. Empty while
            it waits for devices.
        weight: how much its goodput counts, > 0.
        step: optimizer steps done.
        num_samples: samples consumed.
        target_samples: samples after which it ends; None where nobody knows. Policies then go by what it has done.
        throughput_per_s: measured samples/s over the last window, None before the first.
        loss: last smoothed training loss, None before the first.
        is_stale: whether its telemetry stopped; a stale trial keeps its allocation.
        fit: what `fit.update` learned from its telemetry.
        override: the last protective move since the plan in force, if any.
        changed_at_s: when its settings last changed.
        began_at_s: when it was admitted.
        progress: samples of useful progress, counted in samples at the start batch; None where `num_samples` counts.
            `target_samples` is in the same unit.
        attained_s: device-seconds it was granted so far (share times ranks times seconds).
        user: who pays; quotas are per user.
        priority: trials of a higher priority are served first.
        is_protected: whether it is never paused, moved or resized once it runs.
        guaranteed: devices (ranks times share) below which it is never brought once it has them.
        deadline_s: when it should have ended, on the snapshot's clock; None without one.
        restart_s: measured seconds that a restart costs it; None where unmeasured.
        num_restarts: restarts so far.
        requested: what its user would run it with where a policy does not choose (ranks, batch); None for `start`.
        survival: probability that it survives its next rung in the search; None where there is no rung.
        rung_samples: samples at which that rung is; None where there is none.
        memory_fixed_bytes, memory_sample_bytes: memory of one rank, and more of it per sample of the micro-batch; 0
            where not known.
        memory_limit_bytes: memory that each of its ranks may take, 0 where not known.
        resume: the dials with which it begins again after a restart; None where it begins with `start`.
        step_modes: how its steps are executed, where it measured both ways, by tier, micro-batch and accumulation. The
            speeds in `fit` are those of the mode that was settled on.
    """

    trial_id: TrialId
    shape: str
    start: Settings
    limits: DialLimits
    placement: tuple[DeviceId, ...]
    weight: float
    step: int
    num_samples: int
    target_samples: int | None
    throughput_per_s: float | None
    loss: float | None
    is_stale: bool
    fit: TrialFit
    override: Override | None
    changed_at_s: float
    began_at_s: float
    progress: float | None = field(default=None, metadata=SPARSE)
    attained_s: float = field(default=0.0, metadata=SPARSE)
    user: str = field(default="", metadata=SPARSE)
    priority: int = field(default=0, metadata=SPARSE)
    is_protected: bool = field(default=False, metadata=SPARSE)
    guaranteed: float = field(default=0.0, metadata=SPARSE)
    deadline_s: float | None = field(default=None, metadata=SPARSE)
    restart_s: float | None = field(default=None, metadata=SPARSE)
    num_restarts: int = field(default=0, metadata=SPARSE)
    requested: Settings | None = field(default=None, metadata=SPARSE)
    survival: float | None = field(default=None, metadata=SPARSE)
    rung_samples: int | None = field(default=None, metadata=SPARSE)
    memory_fixed_bytes: int = field(default=0, metadata=SPARSE)
    memory_sample_bytes: int = field(default=0, metadata=SPARSE)
    memory_limit_bytes: int = field(default=0, metadata=SPARSE)
    resume: Settings | None = field(default=None, metadata=SPARSE)
    step_modes: tuple[StepModeView, ...] = field(default=(), metadata=SPARSE)

    @property
    def done(self) -> float:
        """Samples of useful progress so far."""
        return self.num_samples if self.progress is None else self.progress

    @property
    def remaining(self) -> float | None:
        """Samples of useful progress until it ends, >= 0; None where its length is unknown."""
        return None if self.target_samples is None else max(0.0, self.target_samples - self.done)

    @property
    def expected_remaining(self) -> float:
        """Samples of useful progress until it ends; where its length is unknown as many as it has done.

        Source: Harchol-Balter and Downey, Exploiting Process Lifetime Distributions (TOCS 1997): of the processes that
        reached an age, half reach twice that age.
        """
        remaining = self.remaining
        return self.done if remaining is None else remaining


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The most devices (ranks times share) that the trials of one user may hold together."""

    user: str
    max_devices: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """A type of node that somebody can be asked for, such as a spot machine with one GPU.

    Attributes:
        name: its name.
        kind: what its devices are.
        num_devices: how many of them it has.
        units: what a share of each is cut from.
        num_ranks: ranks of trials that it can hold.
        price_per_hour: of the whole node, 0 where nobody pays.
        max_nodes: the most there may be.
        nodes: ids of those that are there and stay, sorted.
        leaving: ids of those that are there and will go: told to, or let go; sorted.
        device_type, speed: of its devices, as in `DeviceView`.
        is_spot: whether it may be taken away at any time.
    """

    name: str
    kind: DeviceKind
    num_devices: int
    units: int
    num_ranks: int
    price_per_hour: float
    max_nodes: int
    nodes: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    device_type: str = ""
    speed: float = 1.0
    is_spot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The world at `now_s`: the only argument of `Policy.decide`.

    Attributes:
        now_s: seconds on the controller's monotonic clock.
        seed: the only source of randomness a policy may use.
        plan: the plan in force.
        devices: sorted by device id.
        trials: sorted by trial id; those that wait for devices are among them.
        quotas: sorted by user; a user without one has no quota.
        node_types: types of node that can be asked for, sorted by name.
        waiting: trials that would run if there were room for them, next first; they are in no allocation.
        max_cost_per_hour: what all nodes of `node_types` may cost together, None for no limit.
    """

    now_s: float
    seed: int
    plan: Plan
    devices: tuple[DeviceView, ...]
    trials: tuple[TrialView, ...]
    quotas: tuple[Quota, ...] = field(default=(), metadata=SPARSE)
    node_types: tuple[NodeType, ...] = field(default=(), metadata=SPARSE)
    waiting: tuple[TrialView, ...] = field(default=(), metadata=SPARSE)
    max_cost_per_hour: float | None = field(default=None, metadata=SPARSE)

    def device(self, device_id: DeviceId) -> DeviceView:
        """The device of that id.

        Raises:
            KeyError: there is no such device.
        """
        for device in self.devices:
            if device.device_id == device_id:
                return device
        raise KeyError(device_id)

    def settings_in_force(self, trial: TrialView) -> Settings | None:
        """What the plan in force grants the trial, after its last override; None for a trial new to the plan."""
        if trial.override is not None:
            return trial.override.settings
        allocation = self.plan.allocation(trial.trial_id)
        return None if allocation is None else allocation.settings
