"""Worlds for the conformance suite, by seed: legal snapshots with everything in them that a policy may meet.

`snapshot(seed)` gives newcomers, departures, stale and paused trials, overrides, several ranks on one or several
devices, measured and unmeasured fits, tight limits. Any policy, also a user's own, can be run through them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from orchestrator.policies.decide.shares import Claim, fill
from orchestrator.policies.learn.fit import Observation, TrialFit, update
from orchestrator.policies.plan import EMPTY_PLAN, Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Override, Snapshot, TrialView
from orchestrator.policies.tier import Tier


def snapshots(count: int, first_seed: int = 0) -> Iterator[Snapshot]:
    """`count` worlds, one per seed."""
    for seed in range(first_seed, first_seed + count):
        yield snapshot(seed)


def snapshot(seed: int, num_trials: int | None = None, num_devices: int | None = None) -> Snapshot:
    """The world of that seed; the same seed gives the same world for ever."""
    rng = random.Random(seed)
    devices = _devices(rng, num_devices or rng.choice((1, 1, 1, 2, 3)))
    count = rng.randint(0, 4 * len(devices)) if num_trials is None else num_trials
    trials = [_trial(rng, f"trial_{index:05d}", devices) for index in range(count)]
    trials = _with_room(trials)
    plan = _plan(rng, trials, devices)
    trials = [_after_plan(rng, trial, plan) for trial in trials]
    return Snapshot(now_s=1000.0, seed=seed, plan=plan, devices=devices, trials=tuple(trials))


def after(world: Snapshot, plan: Plan, *, seconds: float = 0.0) -> Snapshot:
    """The same world with `plan` in force, `seconds` later; nothing else happened in between."""
    old = {trial.trial_id: world.settings_in_force(trial) for trial in world.trials}
    trials = []
    for trial in world.trials:
        allocation = plan.allocation(trial.trial_id)
        assert allocation is not None
        is_changed = old[trial.trial_id] != allocation.settings
        changed_at_s = world.now_s if is_changed else trial.changed_at_s
        trials.append(dataclasses.replace(trial, override=None, changed_at_s=changed_at_s))
    return dataclasses.replace(world, now_s=world.now_s + seconds, plan=plan, trials=tuple(trials))


def _devices(rng: random.Random, count: int) -> tuple[DeviceView, ...]:
    kind = rng.choice(tuple(DeviceKind))
    return tuple(
        DeviceView(
            device_id=DeviceId(f"{kind.value}-{index:04d}"),
            node_id=f"node-{index // 8}",
            kind=kind,
            units=rng.choice((1, 2, 16)) if kind is DeviceKind.CPU else 15,
        )
        for index in range(count)
    )


def _trial(rng: random.Random, name: str, devices: tuple[DeviceView, ...]) -> TrialView:
    num_workers = rng.choice((1, 1, 1, 2, 3))
    placement = tuple(rng.choice(devices).device_id for _ in range(num_workers))
    micro_batch, grad_accum = rng.choice((1, 3, 8, 32)), rng.choice((1, 1, 2, 4))
    base = micro_batch * grad_accum * num_workers
    is_batch_fixed = rng.random() < 0.3
    tiers = rng.choice(((Tier.FP32,), (Tier.BF16,), (Tier.FP32, Tier.BF16), (Tier.FP32, Tier.BF16)))
    min_share = rng.choice((0.01, 0.05, 0.1, 1 / 3))
    limits = DialLimits(
        min_share=min_share,
        max_share=max(min_share, rng.choice((0.25, 0.5, 1.0, 1.0))),
        min_global_batch=base if is_batch_fixed else max(1, base // rng.choice((1, 2, 8))),
        max_global_batch=base if is_batch_fixed else base * rng.choice((1, 3, 16)),
        max_micro_batch=micro_batch * rng.choice((1, 2, 5)),
        tiers=tiers,
        can_pause=rng.random() < 0.2,
        min_efficiency=0.9 if micro_batch == 8 else 0.0,
    )
    settings = Settings(
        share=rng.uniform(limits.min_share, limits.max_share),
        micro_batch=micro_batch,
        grad_accum=grad_accum,
        tier=rng.choice(tiers),
        num_workers=num_workers,
    )
    began_at_s = rng.uniform(0.0, 1000.0)
    return TrialView(
        trial_id=TrialId(name),
        shape=rng.choice(("small", "large")),
        start=settings,
        limits=limits,
        placement=placement,
        weight=rng.choice((1.0, 1.0, 0.5, 3.0)),
        step=rng.randint(0, 1000),
        num_samples=rng.randint(0, 10_000),
        target_samples=20_000,
        throughput_per_s=rng.choice((None, rng.uniform(1.0, 1e4))),
        loss=rng.choice((None, rng.uniform(0.1, 10.0))),
        is_stale=rng.random() < 0.15,
        fit=_fit(rng, settings, tiers),
        override=None,
        changed_at_s=rng.uniform(began_at_s, 1000.0),
        began_at_s=began_at_s,
    )


def _fit(rng: random.Random, start: Settings, tiers: tuple[Tier, ...]) -> TrialFit:
    """Nothing, or windows at a few settings with random speeds, outliers and noise among them."""
    if rng.random() < 0.3:
        return TrialFit()
    has_noise = rng.random() < 0.7
    observations = [
        Observation(
            cores=rng.choice((0.25, 0.5, 1.0, 2.0, 7.5)),
            tier=rng.choice(tiers),
            micro_batch=start.micro_batch * rng.choice((1, 1, 2)),
            grad_accum=start.grad_accum,
            num_workers=start.num_workers,
            num_steps=rng.randint(1, 20),
            step_s=rng.lognormvariate(-3.0, 1.0),
            noise_trace=rng.uniform(-1.0, 50.0) if has_noise else None,
            grad_sq=rng.uniform(-0.1, 1.0) if has_noise else None,
            num_noise=rng.randint(0, 10) if has_noise else 0,
        )
        for _ in range(rng.randint(1, 12))
    ]
    return update(TrialFit(), observations)


def _with_room(trials: list[TrialView]) -> list[TrialView]:
    """Only as many trials as a controller would admit: those whose minima fit beside the others'."""
    load: dict[DeviceId, float] = {}
    admitted = []
    for trial in trials:
        wanted = dict(load)
        for device_id in trial.placement:
            wanted[device_id] = wanted.get(device_id, 0.0) + trial.limits.min_share
        if max(wanted.values()) <= 1 or trial.limits.can_pause:
            admitted.append(trial)
            load = load if trial.limits.can_pause else wanted
    return admitted


def _plan(rng: random.Random, trials: list[TrialView], devices: tuple[DeviceView, ...]) -> Plan:
    """A legal plan in force for some of the trials, and sometimes for one that has left since."""
    if rng.random() < 0.15:
        return EMPTY_PLAN
    known = [trial for trial in trials if rng.random() < 0.8]
    running = [trial for trial in known if not (trial.limits.can_pause and rng.random() < 0.5)]
    claims = [
        Claim(
            trial_id=trial.trial_id,
            weight=rng.uniform(0.2, 2.0),
            min_share=trial.limits.min_share,
            max_share=trial.limits.max_share,
            placement=trial.placement,
        )
        for trial in running
    ]
    shares = fill(claims)
    for device in devices:  # too many that may pause: they do
        crowd = [trial for trial in running for rank in trial.placement if rank == device.device_id]
        if sum(shares[trial.trial_id] for trial in crowd) > 1:
            shares.update({trial.trial_id: 0.0 for trial in crowd if trial.limits.can_pause})
    rows = [
        _row(trial.trial_id, dataclasses.replace(trial.start, share=shares.get(trial.trial_id, 0.0)), trial.placement)
        for trial in known
    ]
    if rng.random() < 0.3:
        gone = Settings(share=0.2, micro_batch=4, grad_accum=1, tier=Tier.FP32, num_workers=1)
        rows.append(_row(TrialId("trial_gone"), gone, (rng.choice(devices).device_id,)))
    rows.sort(key=lambda row: row.trial_id)
    return Plan(generation=Generation(rng.randint(1, 500)), allocations=tuple(rows), reason="generated")


def _row(trial_id: TrialId, settings: Settings, placement: tuple[DeviceId, ...]) -> Allocation:
    return Allocation(trial_id=trial_id, settings=settings, placement=placement, effect=Effect.NONE, reason="generated")


def _after_plan(rng: random.Random, trial: TrialView, plan: Plan) -> TrialView:
    """Some trials protected themselves since the plan."""
    allocation = plan.allocation(trial.trial_id)
    if allocation is None or rng.random() > 0.15:
        return trial
    old = allocation.settings
    moves = [dataclasses.replace(old, tier=Tier.FP32), dataclasses.replace(old, share=0.0)]
    if old.micro_batch % 2 == 0:
        moves.append(dataclasses.replace(old, micro_batch=old.micro_batch // 2, grad_accum=2 * old.grad_accum))
    override = Override(number=1, generation=plan.generation, settings=rng.choice(moves), reason="generated")
    return dataclasses.replace(trial, override=override)
