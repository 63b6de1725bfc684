"""Small worlds by hand, for the tests of this folder, and a synthetic one that answers to its dials."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, TrialFit, update
from orchestrator.policies.plan import (
    EMPTY_PLAN,
    Allocation,
    DeviceId,
    Effect,
    Generation,
    Plan,
    Settings,
    TrialId,
    changed_dials,
)
from orchestrator.policies.policy import Policy
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Override, Snapshot, TrialView
from orchestrator.policies.tier import Tier

DEVICE = DeviceId("cpu-0")


def settings(share: float = 0.5, micro_batch: int = 8, grad_accum: int = 1, tier: Tier = Tier.FP32) -> Settings:
    return Settings(share=share, micro_batch=micro_batch, grad_accum=grad_accum, tier=tier, num_workers=1)


def limits(
    *,
    shares: tuple[float, float] = (0.05, 1.0),
    batches: tuple[int, int] = (8, 8),
    max_micro_batch: int = 64,
    tiers: tuple[Tier, ...] = (Tier.FP32,),
    can_pause: bool = False,
) -> DialLimits:
    return DialLimits(
        min_share=shares[0],
        max_share=shares[1],
        min_global_batch=batches[0],
        max_global_batch=batches[1],
        max_micro_batch=max_micro_batch,
        tiers=tiers,
        can_pause=can_pause,
    )


def trial(
    name: str,
    *,
    start: Settings | None = None,
    dials: DialLimits | None = None,
    placement: tuple[DeviceId, ...] = (DEVICE,),
    weight: float = 1.0,
    fit: TrialFit = NOTHING_FITTED,
    is_stale: bool = False,
    override: Override | None = None,
    changed_at_s: float = 0.0,
    shape: str = "one",
) -> TrialView:
    return TrialView(
        trial_id=TrialId(name),
        shape=shape,
        start=dataclasses.replace(start or settings(), num_workers=len(placement)),
        limits=dials or limits(),
        placement=placement,
        weight=weight,
        step=0,
        num_samples=0,
        target_samples=10_000,
        throughput_per_s=None,
        loss=None,
        is_stale=is_stale,
        fit=fit,
        override=override,
        changed_at_s=changed_at_s,
        began_at_s=0.0,
    )


def device(name: str = DEVICE, units: int = 2) -> DeviceView:
    return DeviceView(device_id=DeviceId(name), node_id="node", kind=DeviceKind.CPU, units=units)


def world(trials: Iterable[TrialView], *, plan: Plan = EMPTY_PLAN, now_s: float = 100.0, units: int = 2) -> Snapshot:
    rows = tuple(sorted(trials, key=lambda t: t.trial_id))
    names = sorted({DEVICE} | {device_id for row in rows for device_id in row.placement})
    return Snapshot(now_s=now_s, seed=0, plan=plan, devices=tuple(device(name, units) for name in names), trials=rows)


def in_force(trials: Iterable[TrialView], shares: dict[str, float], **dials: Settings) -> Plan:
    """A plan that grants the start settings, or those given by trial id, at these shares."""
    rows = [
        Allocation(
            trial_id=row.trial_id,
            settings=dataclasses.replace(dials.get(row.trial_id, row.start), share=shares[row.trial_id]),
            placement=row.placement,
            effect=Effect.NONE,
            reason="by hand",
        )
        for row in sorted(trials, key=lambda t: t.trial_id)
    ]
    return Plan(generation=Generation(1), allocations=tuple(rows), reason="by hand")


def observation(
    step_s: float,
    *,
    cores: float = 1.0,
    micro_batch: int = 8,
    grad_accum: int = 1,
    tier: Tier = Tier.FP32,
    noise: tuple[float, float] | None = None,
) -> Observation:
    return Observation(
        cores=cores,
        tier=tier,
        micro_batch=micro_batch,
        grad_accum=grad_accum,
        num_workers=1,
        num_steps=10,
        step_s=step_s,
        noise_trace=None if noise is None else noise[0],
        grad_sq=None if noise is None else noise[1],
        num_noise=0 if noise is None else 10,
    )


def measured(*seen: Observation, windows: int = 3) -> TrialFit:
    """A fit that saw each of these `windows` times."""
    return update(NOTHING_FITTED, [one for one in seen for _ in range(windows)])


@dataclasses.dataclass
class SyntheticWorld:
    """Trials whose true speed is known, steered by a policy in a closed loop.

    Attributes:
        floor_s, slope_s: seconds of work per micro-batch, by tier.
        exponent: true response to cores above one.
        noise: true noise scale.
    """

    trials: list[TrialView]
    policy: Policy
    floor_s: dict[Tier, float]
    slope_s: dict[Tier, float]
    exponent: float = 0.7
    noise: float = 400.0
    units: int = 2
    plan: Plan = EMPTY_PLAN
    now_s: float = 0.0
    rng: random.Random = dataclasses.field(default_factory=lambda: random.Random(7))
    changes: list[tuple[float, TrialId, tuple[str, ...], str]] = dataclasses.field(default_factory=list)

    def step_s(self, dials: Settings) -> float:
        cores = dials.share * self.units
        work_s = self.floor_s[dials.tier] + self.slope_s[dials.tier] * dials.micro_batch
        return dials.grad_accum * work_s / (cores if cores <= 1 else cores**self.exponent)

    def goodput(self, dials: Settings, base_batch: int) -> float:
        efficiency = (self.noise + base_batch) / (self.noise + dials.global_batch)
        return dials.global_batch / self.step_s(dials) * efficiency

    def total(self) -> float:
        """True goodput of the plan in force over all trials."""
        return sum(
            self.goodput(row.settings, next(t for t in self.trials if t.trial_id == row.trial_id).start.global_batch)
            for row in self.plan.allocations
        )

    def snapshot(self) -> Snapshot:
        return world(self.trials, plan=self.plan, now_s=self.now_s, units=self.units)

    def tick(self, seconds: float = 1.0) -> None:
        """One telemetry window, then one decision."""
        self.now_s += seconds
        self.trials = [self._observed(row) for row in self.trials]
        plan = self.policy.decide(self.snapshot())
        for row in plan.allocations:
            before = self.plan.allocation(row.trial_id)
            if before is not None and before.settings != row.settings:
                dials = changed_dials(before.settings, row.settings)
                self.changes.append((self.now_s, row.trial_id, dials, row.reason))
                self.trials = [
                    dataclasses.replace(t, changed_at_s=self.now_s) if t.trial_id == row.trial_id else t
                    for t in self.trials
                ]
        self.plan = plan

    def _observed(self, row: TrialView) -> TrialView:
        allocation = self.plan.allocation(row.trial_id)
        if allocation is None or row.is_stale:
            return row
        dials = allocation.settings
        # 3 % of jitter, and every tenth window three times as slow: somebody else used the machine.
        jitter = self.rng.lognormvariate(0.0, 0.03) * (3.0 if self.rng.random() < 0.1 else 1.0)
        seen = Observation(
            cores=dials.share * self.units,
            tier=dials.tier,
            micro_batch=dials.micro_batch,
            grad_accum=dials.grad_accum,
            num_workers=1,
            num_steps=5,
            step_s=self.step_s(dials) * jitter,
            noise_trace=self.noise * self.rng.uniform(0.5, 1.5),
            grad_sq=self.rng.uniform(0.5, 1.5),
            num_noise=2,
        )
        return dataclasses.replace(row, fit=update(row.fit, [seen]))
