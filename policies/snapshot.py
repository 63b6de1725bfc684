"""All a policy may know, at one instant: devices, trials, what is fitted about them, the plan in force.

Built by the controller from live telemetry, by the simulator from a trace, or by hand; a policy cannot tell which.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from policies.fit import TrialFit
from policies.plan import DeviceId, Plan, Settings, TrialId
from policies.tier import Tier


class DeviceKind(StrEnum):
    """What a device is; decides how a share of it is counted for people (cores, SM groups)."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """One device. `units` is what a share is cut from: cores of a CPU node, SM groups of a GPU."""

    device_id: DeviceId
    node_id: str
    kind: DeviceKind
    units: int


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
    """

    min_share: float
    max_share: float
    min_global_batch: int
    max_global_batch: int
    max_micro_batch: int
    tiers: tuple[Tier, ...]
    can_pause: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A protective move a trial made by itself inside its envelope, as the ledger recorded it."""

    number: int
    generation: int
    settings: Settings
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialView:
    """One trial that holds a worker group, as the policy sees it.

    Attributes:
        trial_id: the trial.
        shape: key of everything that fixes its speed apart from the dials (job, model size); trials of one shape
            share what is measured.
        start: the user's settings, with which the trial began; `start.global_batch` is the base of efficiency.
        limits: the ranges of the dials.
        placement: the device of each rank; fixed while its worker group lives.
        weight: how much its goodput counts, > 0.
        step: optimizer steps done.
        num_samples: samples consumed.
        target_samples: samples after which it ends.
        throughput_per_s: measured samples/s over the last window, None before the first.
        loss: last smoothed training loss, None before the first.
        is_stale: whether its telemetry stopped; a stale trial keeps its allocation.
        fit: what `fit.update` learned from its telemetry.
        override: the last protective move since the plan in force, if any.
        changed_at_s: when its settings last changed.
        began_at_s: when it was admitted.
    """

    trial_id: TrialId
    shape: str
    start: Settings
    limits: DialLimits
    placement: tuple[DeviceId, ...]
    weight: float
    step: int
    num_samples: int
    target_samples: int
    throughput_per_s: float | None
    loss: float | None
    is_stale: bool
    fit: TrialFit
    override: Override | None
    changed_at_s: float
    began_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The world at `now_s`: the only argument of `Policy.decide`.

    Attributes:
        now_s: seconds on the controller's monotonic clock.
        seed: the only source of randomness a policy may use.
        plan: the plan in force.
        devices: sorted by device id.
        trials: sorted by trial id.
    """

    now_s: float
    seed: int
    plan: Plan
    devices: tuple[DeviceView, ...]
    trials: tuple[TrialView, ...]

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
