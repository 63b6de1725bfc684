"""Worlds of movable trials by seed, for the conformance suite: everything in them that a policy for a fleet may meet.

`fleet_world(seed)` gives nodes of several sizes and types, devices that left, waiting, running, stale, protected and
guaranteed trials, quotas, priorities, deadlines, survival, measured and unmeasured shapes, lengths known and unknown.
`walk` lets a policy act in one and the world go on by chance. `search_world` is a plain large one for measuring speed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.learn.fit import Observation, TrialFit, update
from orchestrator.policies.plan import EMPTY_PLAN, Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.policy import Policy
from orchestrator.policies.sample_worlds import snapshot
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Override, Quota, Snapshot, TrialView
from orchestrator.policies.tier import Tier

_NOW_S = 10_000.0
_STEPS_PER_WORLD = 40
_SHAPES = ("small", "medium", "large")
_MOST_TRIALS = 14
_UNKNOWN_LENGTH = 1_000_000
"""Samples after which a trial whose length nobody knows learns no more here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The true speed of a shape, in the form of `policies.learn.scaling`."""

    floor_s: float
    slope_s: float
    sync_s: float
    noise: float
    exponent: float = 0.7

    def step_s(self, settings: Settings, num_nodes: int, units: float) -> float:
        """Seconds per step."""
        micro = self.floor_s + self.slope_s * settings.micro_batch
        wait = 0.0 if settings.num_workers == 1 else self.sync_s * (3.0 if num_nodes > 1 else 1.0)
        cores = settings.share * units
        return (settings.grad_accum * micro + wait) / (cores if cores <= 1 else cores**self.exponent)


def fleet_world(seed: int) -> Snapshot:
    """The world of that seed; the same seed gives the same world for ever."""
    rng = random.Random(seed)
    devices = _devices(rng)
    truths = {name: _truth(rng) for name in _SHAPES}
    trials = [_trial(rng, f"mover_{index:05d}", truths, devices) for index in range(rng.randint(0, 12))]
    trials, plan = _in_force(rng, trials, devices)
    if rng.random() < 0.2:  # a node has left
        gone = rng.choice(devices).node_id
        devices = tuple(device for device in devices if device.node_id != gone)
    fixed = snapshot(seed, num_trials=2, num_devices=1) if rng.random() < 0.2 else None
    if fixed is not None and all(device.kind is DeviceKind.CPU for device in fixed.devices):
        devices += fixed.devices
        trials += list(fixed.trials)
        rows = [row for row in fixed.plan.allocations if row.trial_id != "trial_gone"]
        plan = dataclasses.replace(plan, allocations=(*plan.allocations, *rows))
    quotas = (Quota(user="ann", max_devices=float(rng.randint(1, 6))),) if rng.random() < 0.4 else ()
    trials = _with_unknown_lengths(random.Random(f"lengths-{seed}"), trials)
    return Snapshot(
        now_s=_NOW_S,
        seed=seed,
        plan=dataclasses.replace(plan, allocations=tuple(sorted(plan.allocations, key=lambda row: row.trial_id))),
        devices=tuple(sorted(devices, key=lambda device: device.device_id)),
        trials=tuple(sorted(trials, key=lambda trial: trial.trial_id)),
        quotas=quotas,
    )


def _with_unknown_lengths(rng: random.Random, trials: list[TrialView]) -> list[TrialView]:
    """The length of all, of some or of no movable trials forgotten; drawn apart, so that the rest stays the same."""
    part = rng.choice((0.0, 0.0, 0.3, 1.0))
    return [
        dataclasses.replace(trial, target_samples=None) if trial.limits.can_move and rng.random() < part else trial
        for trial in trials
    ]


def search_world(num_trials: int, num_devices: int, seed: int = 0, node_size: int = 8) -> Snapshot:
    """Many measured trials of six shapes on equal devices, two thirds of them running on one to four devices."""
    rng = random.Random(seed)
    devices = tuple(_device(index, node_size, "h200") for index in range(num_devices))
    truths = {f"shape-{index}": _truth(rng) for index in range(6)}
    trials = []
    for index in range(num_trials):
        row = _trial(rng, f"mover_{index:05d}", truths, devices)
        limits = dataclasses.replace(row.limits, min_workers=1, max_workers=64, min_share=1.0, can_pause=True)
        trials.append(
            dataclasses.replace(row, limits=limits, is_stale=False, is_protected=False, guaranteed=0.0, user="")
        )
    trials, plan = _in_force(rng, trials, devices)
    return Snapshot(now_s=_NOW_S, seed=seed, plan=plan, devices=devices, trials=tuple(trials))


def after(world: Snapshot, plan: Plan, *, seconds: float = 0.0) -> Snapshot:
    """The same world with `plan` in force, `seconds` later; nothing else happened in between."""
    trials = []
    for trial in world.trials:
        row = plan.allocation(trial.trial_id)
        assert row is not None
        is_changed = world.settings_in_force(trial) != row.settings or row.placement != trial.placement
        changed_at_s = world.now_s if is_changed else trial.changed_at_s
        trials.append(dataclasses.replace(trial, override=None, changed_at_s=changed_at_s, placement=row.placement))
    return dataclasses.replace(world, now_s=world.now_s + seconds, plan=plan, trials=tuple(trials))


def walk(policy: Policy, seed: int, num_steps: int) -> Iterator[tuple[Snapshot, Plan]]:
    """Worlds and what the policy decided in them, each following from the last by that decision and by chance.

    Between two decisions time passes, trials learn, end, come, fall silent, protect themselves, are protected or
    guaranteed something, nodes leave and return, quotas change. After some steps it is a new fleet.
    """
    rng = random.Random(f"walk-{seed}")
    for step in range(num_steps):
        if step % _STEPS_PER_WORLD == 0:
            world = fleet_world(rng.randrange(2**31))
            devices, truths = world.devices or (_any_device(),), {name: _truth(rng) for name in _SHAPES}
        plan = policy.decide(world)
        yield world, plan
        world = _later(rng, after(world, plan, seconds=rng.choice((1.0, 20.0, 60.0, 300.0))), step)
        if rng.random() < 0.1:
            gone = rng.choice(devices).node_id
            world = dataclasses.replace(world, devices=tuple(each for each in devices if each.node_id != gone))
        elif rng.random() < 0.3:
            world = dataclasses.replace(world, devices=devices)
        if len(world.trials) < _MOST_TRIALS and rng.random() < 0.4:
            came = _trial(rng, f"mover_new_{step:06d}", truths, devices)
            came = dataclasses.replace(came, began_at_s=world.now_s, changed_at_s=world.now_s, attained_s=0.0)
            world = dataclasses.replace(world, trials=tuple(sorted((*world.trials, came), key=lambda t: t.trial_id)))


def _later(rng: random.Random, world: Snapshot, step: int) -> Snapshot:
    """What becomes of the trials and quotas of a world."""
    trials = [_lives_on(rng, trial, world, step) for trial in world.trials if rng.random() > 0.03]
    quotas = world.quotas
    if rng.random() < 0.1:
        limits = {user: float(rng.randint(0, 6)) for user in ("ann", "bob") if rng.random() < 0.5}
        quotas = tuple(Quota(user=user, max_devices=most) for user, most in sorted(limits.items()))
    return dataclasses.replace(world, trials=tuple(trials), quotas=quotas)


def _lives_on(rng: random.Random, trial: TrialView, world: Snapshot, step: int) -> TrialView:
    settings = world.settings_in_force(trial)
    runs = settings is not None and settings.share > 0
    if runs:
        length = trial.target_samples or _UNKNOWN_LENGTH
        num_samples = min(length, trial.num_samples + rng.randrange(1 + length // 20))
        trial = dataclasses.replace(trial, num_samples=max(trial.num_samples, num_samples))
    if not trial.limits.can_move:  # its promises are those of `sample_worlds`
        return trial
    if runs and settings is not None and settings.micro_batch > 1 and rng.random() < 0.03:
        safer = dataclasses.replace(settings, micro_batch=settings.micro_batch // 2, grad_accum=2 * settings.grad_accum)
        override = Override(number=step, generation=world.plan.generation, settings=safer, reason="out of memory")
        trial = dataclasses.replace(trial, override=override)
    if rng.random() < 0.2:
        trial = dataclasses.replace(trial, fit=_fit(rng, _truth(rng), trial.start, world.devices or (_any_device(),)))
    changes = rng.random()
    if changes < 0.03:
        return dataclasses.replace(trial, is_protected=not trial.is_protected)
    if changes < 0.06:
        return dataclasses.replace(trial, guaranteed=rng.choice((0.0, 0.25, 1.0, 2.0)))
    if changes < 0.09:
        return dataclasses.replace(trial, is_stale=not trial.is_stale, priority=rng.choice((0, 1, 2)))
    return dataclasses.replace(trial, survival=rng.choice((None, 0.1, 0.9))) if changes < 0.2 else trial


def _any_device() -> DeviceView:
    return _device(0, 1, "h200")


def _devices(rng: random.Random) -> tuple[DeviceView, ...]:
    devices: list[DeviceView] = []
    for name in rng.choice((("h200",), ("h200",), ("a100", "t4"))):
        size = rng.choice((1, 2, 4, 8))
        for _ in range(size * rng.randint(1, 4)):
            devices.append(_device(len(devices), size, name))
    return tuple(devices)


def _device(index: int, node_size: int, device_type: str) -> DeviceView:
    return DeviceView(
        device_id=DeviceId(f"gpu-{index:05d}"),
        node_id=f"{device_type}-{index // node_size:05d}",
        kind=DeviceKind.CUDA,
        units=15,
        device_type=device_type,
        speed={"t4": 0.3}.get(device_type, 1.0),
    )


def _truth(rng: random.Random) -> Truth:
    return Truth(
        floor_s=rng.uniform(0.005, 0.05),
        slope_s=rng.uniform(0.0005, 0.01),
        sync_s=rng.uniform(0.001, 0.1),
        noise=rng.lognormvariate(6.0, 1.0),
    )


def _trial(rng: random.Random, name: str, truths: dict[str, Truth], devices: tuple[DeviceView, ...]) -> TrialView:
    shape = rng.choice(sorted(truths))
    micro_batch = rng.choice((8, 16, 32))
    tiers = rng.choice(((Tier.FP32,), (Tier.BF16,), (Tier.FP32, Tier.BF16)))
    start = Settings(share=1.0, micro_batch=micro_batch, grad_accum=1, tier=tiers[0], num_workers=1)
    is_batch_fixed = rng.random() < 0.3
    fewest = rng.choice((1, 1, 1, 2))
    base = micro_batch * fewest
    wish = rng.choice((1, 1, 2, 4))
    limits = DialLimits(
        min_share=rng.choice((0.125, 0.25, 1.0)),
        max_share=1.0,
        min_global_batch=base,
        max_global_batch=base if is_batch_fixed else base * 64,
        max_micro_batch=micro_batch * rng.choice((1, 2, 4)),
        tiers=tiers,
        can_pause=rng.random() < 0.9,
        can_move=True,
        min_workers=fewest,
        max_workers=fewest * rng.choice((1, 2, 8)),
        min_efficiency=0.9 if micro_batch == 8 else 0.0,
    )
    began_at_s = rng.uniform(0.0, _NOW_S)
    target = rng.randint(10_000, 10_000_000)
    return TrialView(
        trial_id=TrialId(name),
        shape=shape,
        start=dataclasses.replace(start, num_workers=fewest),
        limits=limits,
        placement=(),
        weight=rng.choice((1.0, 1.0, 1.0, 2.0)),
        step=rng.randint(0, 1000),
        num_samples=rng.randint(0, target),
        target_samples=target,
        throughput_per_s=None,
        loss=None,
        is_stale=rng.random() < 0.05,
        fit=_fit(rng, truths[shape], start, devices),
        override=None,
        changed_at_s=rng.uniform(began_at_s, _NOW_S),
        began_at_s=began_at_s,
        attained_s=rng.uniform(0.0, 100_000.0),
        user=rng.choice(("ann", "bob")),
        priority=rng.choice((0, 0, 0, 1)),
        is_protected=rng.random() < 0.1,
        guaranteed=rng.choice((0.0, 0.0, 0.0, 0.25, 1.0)),
        deadline_s=_NOW_S + rng.uniform(-100.0, 10_000.0) if rng.random() < 0.3 else None,
        restart_s=rng.choice((None, 5.0, 60.0)),
        num_restarts=rng.randint(0, 3),
        requested=dataclasses.replace(start, num_workers=wish, grad_accum=1),
        survival=rng.choice((None, 0.02, 0.3, 1.0)),
    )


def _fit(rng: random.Random, truth: Truth, start: Settings, devices: tuple[DeviceView, ...]) -> TrialFit:
    """Nothing, or windows at a few sizes of the truth with a little error."""
    if rng.random() < 0.2:
        return TrialFit()
    seen = []
    for workers, nodes in rng.sample(((1, 1), (1, 1), (2, 1), (4, 1), (8, 2)), 3):
        tier = rng.choice((start.tier, Tier.BF16))
        settings = dataclasses.replace(
            start, num_workers=workers, micro_batch=start.micro_batch * rng.choice((1, 2)), tier=tier
        )
        device = rng.choice(devices)
        for _ in range(3):
            seen.append(
                Observation(
                    cores=float(device.units),
                    tier=tier,
                    micro_batch=settings.micro_batch,
                    grad_accum=1,
                    num_workers=workers,
                    num_steps=10,
                    step_s=truth.step_s(settings, nodes, device.units) / device.speed * rng.lognormvariate(0.0, 0.02),
                    noise_trace=truth.noise,
                    grad_sq=1.0,
                    num_noise=5,
                    num_nodes=nodes,
                    device_type=device.device_type,
                )
            )
    return update(TrialFit(), seen)


def _in_force(
    rng: random.Random, trials: list[TrialView], devices: tuple[DeviceView, ...]
) -> tuple[list[TrialView], Plan]:
    """A legal plan in force for most of the trials: some run, some wait; the others are new."""
    if rng.random() < 0.1:
        return trials, EMPTY_PLAN
    fleet, rows, placed = Fleet(devices), [], []
    for trial in trials:
        low, high = trial.limits.min_workers or 1, trial.limits.max_workers or 1
        workers = min(high, max(low, rng.choice((1, 1, 2, 4))))
        share = trial.limits.min_share if workers == 1 and rng.random() < 0.3 else 1.0
        seats = fleet.find(rng.randrange(len(fleet.types)), workers, share) if rng.random() < 0.7 else None
        settings = dataclasses.replace(trial.start, num_workers=workers, share=0.0 if seats is None else share)
        if settings.global_batch > trial.limits.max_global_batch:  # the batch is kept as well as it divides
            micro_batch = max(1, trial.limits.max_global_batch // workers)
            settings = dataclasses.replace(settings, micro_batch=micro_batch)
        placement: tuple[DeviceId, ...] = ()
        if seats is not None:
            fleet.take(seats, share)
            placement = fleet.placement(seats)
        if rng.random() < 0.9 or seats is not None:
            rows.append(
                Allocation(
                    trial_id=trial.trial_id,
                    settings=settings,
                    placement=placement,
                    effect=Effect.NONE,
                    reason="generated",
                )
            )
        placed.append(dataclasses.replace(trial, placement=placement))
    return placed, Plan(generation=Generation(rng.randint(1, 500)), allocations=tuple(rows), reason="generated")
