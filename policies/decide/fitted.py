"""The trials of a snapshot with their fitted models, and the parts of a plan that all policies make alike.

Speeds and memory are pooled over trials of one shape; `FittedTrial` predicts steps, goodput and memory from them. Room
for newcomers, fair shares, allocations and the plan around them are here too. Decides no dial itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.policies.decide.shares import Claim, components, fill, fits
from orchestrator.policies.learn.efficiency import efficiency, goodput
from orchestrator.policies.learn.fit import noise_scale, pool
from orchestrator.policies.learn.memory import MemoryLine, MemoryPoint, largest_micro_batch, largest_split, solve_line
from orchestrator.policies.learn.speed import Prediction, SpeedModel, as_known, response, solve
from orchestrator.policies.learn.tier_fit import numerical_efficiency, step_ratio, usable
from orchestrator.policies.plan import Allocation, Alternative, DeviceId, Generation, Plan, Settings, TrialId, effect_of
from orchestrator.policies.snapshot import DeviceKind, Snapshot, TrialView
from orchestrator.policies.tier import Tier

_EPSILON = 1e-9
_CALIBRATION_DOUBT = 0.05
_FLOOR_RATIO = {DeviceKind.CPU: 0.15, DeviceKind.CUDA: 0.5}
"""Part of a micro-batch's time that is assumed not to grow with it until two sizes were measured: a core is always busy
(small language models on one: 0.05 to 0.2), a GPU with a small batch waits for its launches."""
_SAME_SHARE = 1e-4
"""Shares closer than this are the same: no mechanism can tell them apart, and rounding must not move a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTrial:
    """One trial with the models that all trials of its shape measured.

    Attributes:
        trial: the trial.
        in_force: its settings in force, None for a trial new to the plan.
        settings: the settings in force, else the start settings; with the number of workers it has.
        age_s: seconds since its settings last changed.
        units: what a share of 1 is cut from on its smallest device.
        model: speeds measured by all trials of its shape.
        noise: its own noise scale, None before it is known.
        kind: what it computes on.
        memory: peaks measured by all trials of its shape.
    """

    trial: TrialView
    in_force: Settings | None
    settings: Settings
    age_s: float
    units: int
    model: SpeedModel
    noise: float | None
    kind: DeviceKind
    memory: tuple[MemoryPoint, ...] = ()

    @property
    def trial_id(self) -> TrialId:
        """The trial's id."""
        return self.trial.trial_id

    @property
    def is_pinned(self) -> bool:
        """Whether it is stale while it should be running, and so keeps what it has. A paused trial is not stale."""
        return self.trial.is_stale and self.in_force is not None and self.in_force.share > 0

    @property
    def is_measured(self) -> bool:
        """Whether any speed of its shape is known."""
        return bool(self.model.lines)

    def is_resting(self, pause_s: float) -> bool:
        """Whether it is paused and was so for less than `pause_s`."""
        return self.in_force is not None and self.in_force.share == 0 and self.age_s < pause_s

    def predict(self, settings: Settings) -> Prediction | None:
        """Seconds per step under `settings`; None where nothing is known of that tier or the trial is paused.

        A tier that no trial ran yet is predicted from the present one by what calibration found of both. On a GPU so is
        any other tier: what runs beside a trial there may double its time, so that speeds of different times say little
        of two tiers, and calibration has timed them in turn.
        """
        predicted = self._predict(settings, settings.tier)
        ratio = step_ratio(self.trial.fit.tiers, settings.tier, self.settings.tier)
        if ratio is None or (predicted is not None and self._is_comparable(settings.tier)):
            return predicted
        known = self._predict(settings, self.settings.tier)
        if known is None:
            return predicted
        doubt = math.hypot(known.rel_uncertainty, _CALIBRATION_DOUBT)
        return dataclasses.replace(known, step_s=known.step_s * ratio, is_measured=False, rel_uncertainty=doubt)

    def _is_comparable(self, tier: Tier) -> bool:
        """Whether measured speeds of that tier may be held against those of the present one."""
        return tier is self.settings.tier or self.kind is not DeviceKind.CUDA

    def _predict(self, settings: Settings, tier: Tier) -> Prediction | None:
        return self.model.predict(
            cores=settings.share * self.units,
            micro_batch=settings.micro_batch,
            grad_accum=settings.grad_accum,
            tier=tier,
        )

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers it may use now: allowed, not fled from, and, where it has a guard, real and safe."""
        trial = self.trial
        return usable(trial.limits.tiers, trial.fit.tiers, trial.fit.banned_tiers, self.settings.tier)

    def goodput(self, settings: Settings) -> float | None:
        """Samples per second of useful progress under `settings`; None where it cannot be predicted."""
        prediction = self.predict(settings)
        if prediction is None:
            return None
        numerical = numerical_efficiency(self.trial.fit.tiers, settings.tier, self.noise, settings.global_batch)
        throughput_per_s = numerical * settings.global_batch / prediction.step_s
        return goodput(throughput_per_s, self.noise, self.trial.start.global_batch, settings.global_batch)

    def wastes(self, global_batch: int, noise_scale: float) -> bool:
        """Whether a sample of a batch above the start's is worth less at that noise scale than the limits allow."""
        limits, base = self.trial.limits, self.trial.start.global_batch
        return global_batch > base and efficiency(noise_scale, base, global_batch) < limits.min_efficiency

    def memory_line(self, settings: Settings) -> MemoryLine | None:
        """What a rank takes in the tier of `settings`; None where its memory or the limit of it is not known."""
        if self.trial.memory_limit_bytes <= 0:
            return None
        return solve_line(self.memory, settings.tier, settings.num_workers)

    @property
    def largest_micro_batch(self) -> int:
        """The largest micro-batch in its present tier that is allowed, did not overflow, and is predicted to fit.

        With the present accumulation it stays inside the largest global batch. 0 where memory says nothing.
        """
        line = self.memory_line(self.settings)
        if line is None:
            return 0
        limits, settings = self.trial.limits, self.settings
        most = min(limits.max_micro_batch, limits.max_global_batch // (settings.grad_accum * settings.num_workers))
        most = min(most, self.trial.fit.micro_batch_cap or most)
        return largest_micro_batch(line, self.trial.memory_limit_bytes, most) if most >= 1 else 0

    def has_room(self, settings: Settings) -> bool:
        """Whether a rank is predicted to stay within its memory under `settings`, as far as that is known."""
        line = self.memory_line(settings)
        return line is None or line.needed_bytes(settings.micro_batch) <= self.trial.memory_limit_bytes

    def speedup(self, share: float, reference_share: float) -> float:
        """Speed at `share` over that at `reference_share`; what it computes does not matter to the ratio."""
        exponent = self.model.exponent
        return response(share * self.units, exponent) / response(reference_share * self.units, exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Who takes part in a division, and who gets nothing and why.

    Attributes:
        claims: those who get a share; their minima fit every device if pausing could make them fit.
        resting: ids that get share 0, each with the reason.
    """

    claims: tuple[Claim, ...]
    resting: Mapping[TrialId, str]


def fit_trials(snapshot: Snapshot) -> tuple[FittedTrial, ...]:
    """Every trial of the snapshot with its models, sorted by trial id."""
    units = {device.device_id: device.units for device in snapshot.devices}
    kinds = {device.device_id: device.kind for device in snapshot.devices}
    in_force = {allocation.trial_id: allocation.settings for allocation in snapshot.plan.allocations}
    trials = sorted(snapshot.trials, key=lambda trial: trial.trial_id)
    pooled = {shape: pool([t.fit for t in trials if t.shape == shape]) for shape in sorted({t.shape for t in trials})}
    models = {
        (shape, workers, kind): solve(pooled[shape].cells, workers, _FLOOR_RATIO[kind])
        for shape, workers, kind in {(trial.shape, len(trial.placement), _kind_of(trial, kinds)) for trial in trials}
    }
    nodes = {device.device_id: device.node_id for device in snapshot.devices}
    fitted_trials = []
    for trial in trials:
        old = in_force.get(trial.trial_id) if trial.override is None else trial.override.settings
        workers, kind = len(trial.placement), _kind_of(trial, kinds)
        fitted = FittedTrial(
            trial=trial,
            in_force=old,
            settings=_on_workers(old or trial.resume or trial.start, workers, trial),
            age_s=snapshot.now_s - trial.changed_at_s,
            units=min((units[device_id] for device_id in trial.placement if device_id in units), default=1),
            model=models[trial.shape, workers, kind]
            if (known := pooled[trial.shape].known_speed) is None
            else as_known(known, workers, len({nodes.get(device_id) for device_id in trial.placement})),
            noise=noise_scale(trial.fit),
            kind=kind,
            memory=pooled[trial.shape].memory,
        )
        fitted_trials.append(fitted if old is not None else _admitted(fitted))
    return tuple(fitted_trials)


def _kind_of(trial: TrialView, kinds: Mapping[DeviceId, DeviceKind]) -> DeviceKind:
    """What the trial computes on; devices of one trial are of one kind."""
    return next((kinds[device_id] for device_id in trial.placement if device_id in kinds), DeviceKind.CPU)


def _admitted(fitted: FittedTrial) -> FittedTrial:
    """A trial new to the plan: its global batch cut into micro-batches that its memory is predicted to hold."""
    settings = fitted.settings
    line = fitted.memory_line(settings)
    if line is None or fitted.has_room(settings):
        return fitted
    per_rank = settings.micro_batch * settings.grad_accum
    at_most = max(1, largest_micro_batch(line, fitted.trial.memory_limit_bytes, settings.micro_batch))
    micro_batch = largest_split(per_rank, at_most)
    smaller = dataclasses.replace(settings, micro_batch=micro_batch, grad_accum=per_rank // micro_batch)
    if smaller.grad_accum > (fitted.trial.limits.max_grad_accum or smaller.grad_accum):
        return fitted
    return dataclasses.replace(fitted, settings=smaller)


def claim_of(fitted: FittedTrial, *, weight: float, max_share: float) -> Claim:
    """The trial's claim: a stale one to exactly what it has, any other between its minimum and `max_share`."""
    limits = fitted.trial.limits
    low, high = limits.min_share, max(limits.min_share, max_share)
    if fitted.is_pinned:
        low = high = min(limits.max_share, max(limits.min_share, fitted.settings.share))
    return Claim(
        trial_id=fitted.trial_id,
        weight=weight,
        min_share=low,
        max_share=high,
        placement=fitted.trial.placement,
    )


def make_room(fitted_trials: Sequence[FittedTrial], claims: Iterable[Claim], pause_s: float) -> Room:
    """Let trials rest that are paused for less than `pause_s`, then give way until all minima fit.

    First stale trials give up to their minimum, then trials that may pause do: lightest first, then the youngest.
    """
    by_id = {fitted.trial_id: fitted for fitted in fitted_trials}
    resting = {
        s.trial_id: f"rests since {s.age_s:.1f} s of {pause_s:.1f} s after its pause"
        for s in fitted_trials
        if s.is_resting(pause_s)
    }
    kept = {claim.trial_id: claim for claim in claims if claim.trial_id not in resting}
    for device_id in _crowded(kept.values()):
        for claim in [c for c in kept.values() if device_id in c.placement]:
            low = min(claim.min_share, by_id[claim.trial_id].trial.limits.min_share)
            kept[claim.trial_id] = dataclasses.replace(claim, min_share=low)
    paused = []
    crowded = set(_crowded(kept.values()))
    for trial in sorted((s.trial for s in fitted_trials), key=lambda t: (t.weight, -t.began_at_s, t.trial_id)):
        full = crowded.intersection(trial.placement)
        if trial.trial_id in kept and trial.limits.can_pause and full:
            resting[trial.trial_id] = f"paused at weight {trial.weight:g}: minima of others fill {min(full)}"
            paused.append(kept.pop(trial.trial_id))
            crowded = set(_crowded(kept.values()))
    for claim in reversed(paused):  # a later pause may have made room for an earlier one
        if not set(_crowded([*kept.values(), claim])).intersection(claim.placement):
            kept[claim.trial_id] = claim
            del resting[claim.trial_id]
    return Room(claims=tuple(kept[trial_id] for trial_id in sorted(kept)), resting=resting)


def fill_room(fitted_trials: Iterable[FittedTrial], room: Room) -> dict[TrialId, float]:
    """Fair shares for all who take part. Trials that share devices keep what they have if it is as good as that."""
    in_force = {s.trial_id: s.in_force.share for s in fitted_trials if s.in_force is not None}
    shares = fill(room.claims)
    for group in components(room.claims):
        is_near = all(
            abs(in_force.get(c.trial_id, math.inf) - shares[c.trial_id]) <= _SAME_SHARE
            and c.min_share <= in_force[c.trial_id] <= c.max_share
            for c in group
        )
        if is_near and fits(group, in_force):
            shares |= {c.trial_id: in_force[c.trial_id] for c in group}
    return shares


def allocate(
    fitted: FittedTrial, settings: Settings, *, reason: str, binding: str, alternatives: tuple[Alternative, ...] = ()
) -> Allocation:
    """The allocation of `settings`, with its effect and what it is predicted to bring."""
    old = fitted.in_force
    after = fitted.goodput(settings)
    before = None if old is None else fitted.goodput(old)
    return Allocation(
        trial_id=fitted.trial_id,
        settings=settings,
        placement=fitted.trial.placement,
        effect=effect_of(old, settings),
        reason=reason,
        binding=binding,
        predicted_goodput=after,
        predicted_gain=None if not before or after is None else after / before - 1,
        alternatives=alternatives,
    )


def make_plan(snapshot: Snapshot, name: str, allocations: Iterable[Allocation]) -> Plan:
    """The next plan, sorted, with one sentence on what it changes."""
    rows = tuple(sorted(allocations, key=lambda allocation: allocation.trial_id))
    in_force = {allocation.trial_id: allocation.settings for allocation in snapshot.plan.allocations}
    num_new = sum(row.trial_id not in in_force for row in rows)
    num_changed = sum(in_force.get(row.trial_id, row.settings) != row.settings for row in rows)
    num_gone = len(in_force.keys() - {row.trial_id for row in rows})
    return Plan(
        generation=Generation(snapshot.plan.generation + 1),
        allocations=rows,
        reason=f"{name}: {len(rows)} trials, {num_changed} changed, {num_new} new, {num_gone} gone",
    )


def _on_workers(settings: Settings, num_workers: int, trial: TrialView) -> Settings:
    """The settings for a group of that size, the global batch kept as well as it divides."""
    if settings.num_workers == num_workers:
        return settings
    limits = trial.limits
    low = math.ceil(limits.min_global_batch / num_workers)
    high = max(low, limits.max_global_batch // num_workers)
    per_rank = min(high, max(low, round(settings.global_batch / num_workers)))
    grad_accum = next(
        (n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= limits.max_micro_batch), per_rank
    )
    return dataclasses.replace(
        settings, num_workers=num_workers, micro_batch=per_rank // grad_accum, grad_accum=grad_accum
    )


def _crowded(claims: Iterable[Claim]) -> tuple[DeviceId, ...]:
    """Devices whose claims' minima do not fit, sorted."""
    load: dict[DeviceId, float] = defaultdict(float)
    for claim in claims:
        for device_id in claim.placement:
            load[device_id] += claim.min_share
    return tuple(sorted(device_id for device_id, total in load.items() if total > 1 + _EPSILON))
