"""Choosing batch and tier of one trial: its neighbours by predicted goodput, which trial tries a new tier, and in which
tier a new one begins.

One change at a time: never batch and tier of a trial in one decision, so that what it brought can be told.
Shares are chosen elsewhere (`policies.decide.division`); in the speed model they scale all candidates of a trial alike.
Called by `policies.decide.goodput`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.policies.decide.batch import neighbours
from orchestrator.policies.decide.fitted import FittedTrial
from orchestrator.policies.invariants import MAX_ALTERNATIVES
from orchestrator.policies.learn.efficiency import efficiency
from orchestrator.policies.learn.fit import noise_bounds
from orchestrator.policies.learn.tier_fit import step_ratio
from orchestrator.policies.plan import Alternative, Settings, TrialId
from orchestrator.policies.tier import Tier, is_cheaper, is_coarse, tier_facts

Bounds = tuple[float, float]
"""The lowest and the highest that the noise scale may be."""

NOISE_GROWTH = 2.0
"""By how much the noise scale may grow before a smaller batch has paid: it rises as the loss falls, several times over
a training (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training")."""

REST_PART = 0.05
"""Part of a trial's time after which its dials may move again, where that is less than the cooldown: a trial of 20 s
that rested for 10 would have nothing left to gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialChoice:
    """The chosen settings, why, what stopped the choice from going further, and what else was weighed."""

    settings: Settings
    reason: str
    binding: str
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class _Option:
    settings: Settings
    goodput: float
    gain: float
    needed_gain: float


def explorers(fitted_trials: Iterable[FittedTrial], cooldown_s: float) -> dict[TrialId, Tier]:
    """Which trials try which unmeasured tier now: at most one per shape and size of group, the first by id.

    A shape waits while one of its running trials already is on an unmeasured tier.
    """
    waiting: set[tuple[str, int]] = set()
    chosen: dict[tuple[str, int], tuple[TrialId, Tier]] = {}
    for fitted in fitted_trials:
        key = (fitted.trial.shape, fitted.settings.num_workers)
        is_running = fitted.settings.share > 0 and not fitted.trial.is_stale
        if is_running and not fitted.model.is_measured(fitted.settings.tier):
            waiting.add(key)
        elif is_running and key not in chosen and (tier := _next_tier(fitted, cooldown_s)) is not None:
            chosen[key] = (fitted.trial_id, tier)
    return {trial_id: tier for key, (trial_id, tier) in chosen.items() if key not in waiting}


def beginnings(fitted_trials: Iterable[FittedTrial], min_gain: float) -> dict[TrialId, Tier]:
    """Which new trials begin in a cheaper tier than they were given, since others of their shape have proved it.

    Proved is a tier in which one of them runs, which more find safe than probed it elsewhere and do not, which none has
    fled from, and which gains `min_gain` by their calibration. One that has begun in it and has not probed it often
    enough yet has no say. The guard of the new trial watches it there from the first step on.
    """
    known: dict[str, list[FittedTrial]] = {}
    for fitted in fitted_trials:
        if fitted.in_force is not None and fitted.in_force.share > 0 and not fitted.trial.is_stale:
            known.setdefault(fitted.trial.shape, []).append(fitted)
    chosen = {}
    for fitted in fitted_trials:
        trial = fitted.trial
        is_fresh = fitted.in_force is None and trial.num_samples == 0 and trial.resume is None
        if not is_fresh or trial.fit.tiers or trial.fit.banned_tiers:
            continue
        given, peers = fitted.settings, known.get(trial.shape, [])
        gains = {
            tier: gain
            for tier in trial.limits.tiers
            if is_cheaper(tier, given.tier)
            and (gain := _proved_gain(peers, tier, given.tier)) >= min_gain
            and fitted.has_room(dataclasses.replace(given, tier=tier))
        }
        if gains:
            chosen[fitted.trial_id] = max(gains, key=lambda tier: (gains[tier], tier.value))
    return chosen


def _proved_gain(peers: Iterable[FittedTrial], tier: Tier, given: Tier) -> float:
    """What `tier` gains over the `given` one by those trials; -1 where it is not proved."""
    if is_coarse(tier):  # such a tier shows its harm late
        return -1.0
    num_for, num_against, gains, has_fled = 0, 0, [], False
    for peer in peers:
        fit = peer.trial.fit
        has_fled |= tier in fit.banned_tiers
        found = next((each for each in fit.tiers if each.tier is tier and each.noise_ratio is not None), None)
        if found is None or not found.is_real:
            continue
        num_for += found.is_safe
        num_against += not found.is_safe and peer.settings.tier is not tier
        ratio = step_ratio(fit.tiers, tier, given)
        if found.is_safe and peer.settings.tier is tier and ratio is not None:
            gains.append(1 / ratio - 1)
    return min(gains) if gains and not has_fled and num_for > num_against else -1.0


def choose(
    fitted: FittedTrial,
    share: float,
    *,
    min_gain: float,
    cooldown_s: float,
    explored: Tier | None,
    begins_in: Tier | None,
) -> DialChoice:
    """Batch and tier of a trial at `share`.

    Args:
        fitted: the trial.
        share: what it was granted.
        min_gain: relative gain below which nothing is changed.
        cooldown_s: seconds after a change in which its dials rest, or `REST_PART` of the time it takes if that is less.
        explored: the unmeasured tier it was chosen to try, if any.
        begins_in: the tier in which a new trial begins, None for the one it was given and for trials that are not new.
    """
    now = dataclasses.replace(fitted.settings, share=share)
    if begins_in is not None:
        reason = f"begins with batch {now.global_batch} and in {begins_in.value}, which its kind has found safe"
        return DialChoice(settings=dataclasses.replace(now, tier=begins_in), reason=reason, binding="new")
    kept = _why_kept(fitted, now, cooldown_s)
    if kept is not None:
        return DialChoice(settings=now, reason=kept[1], binding=kept[0])
    goodput = fitted.goodput(now)
    prediction = fitted.predict(now)
    assert goodput is not None
    assert prediction is not None
    weighed, bounds = _options(fitted, now, goodput, min_gain), noise_bounds(fitted.trial.fit)
    fitting = [option for option in weighed if fitted.has_room(option.settings)]
    options = [option for option in fitting if not _is_wasteful(fitted, now, option.settings, bounds)]
    unsure = [option for option in options if not _is_sure(fitted, now, option.settings, bounds)]
    if explored is not None:
        reason = (
            f"explores tier {explored.value}, not yet measured; "
            f"{now.tier.value} is, at {prediction.step_s * 1e3:.1f} ms per step"
        )
        settings = dataclasses.replace(now, tier=explored)
        return DialChoice(
            settings=settings, reason=reason, binding="exploring", alternatives=_rest(options, settings, now, goodput)
        )
    smaller = _way_back(fitted, now, options, bounds)
    if smaller is not None:
        rest = _rest(options, smaller.settings, now, goodput)
        reason = _why_smaller(fitted, now, smaller, bounds)
        return DialChoice(settings=smaller.settings, reason=reason, binding="efficiency", alternatives=rest)
    best = max((o for o in options if o.gain >= o.needed_gain and o not in unsure), key=_rank, default=None)
    if best is None:
        refused = [o for o in weighed if o.gain >= o.needed_gain and o not in fitting]
        wasteful = [o for o in fitting if o.gain >= o.needed_gain and o not in options]
        doubted = [o for o in unsure if o.gain >= o.needed_gain]
        if refused:
            reason, binding = _why_no_room(fitted, now, refused)
        elif wasteful:
            reason, binding = _why_wasteful(fitted, now, max(wasteful, key=_rank), bounds), "efficiency"
        elif doubted:
            reason, binding = _why_unsure(now, max(doubted, key=_rank), bounds), "noise"
        else:
            reason, binding = _why_best(now, goodput, options)
        return DialChoice(settings=now, reason=reason, binding=binding, alternatives=_rest(options, now, now, goodput))
    return DialChoice(
        settings=best.settings,
        reason=_why_changed(fitted, now, best),
        binding="one change at a time",
        alternatives=_rest(options, best.settings, now, goodput),
    )


def _next_tier(fitted: FittedTrial, cooldown_s: float) -> Tier | None:
    """The dearest allowed tier below the present one that nobody has measured, if the trial is free to try it.

    A trial with a guard of its own has nothing to try: its tiers are calibrated and probed.
    """
    settings = fitted.settings
    if fitted.in_force is None or fitted.age_s < cooldown_s or fitted.trial.fit.tiers:
        return None
    prediction = fitted.predict(settings)
    if prediction is None or not prediction.is_measured:
        return None
    unmeasured = [
        tier
        for tier in fitted.tiers
        if is_cheaper(tier, settings.tier)
        and not fitted.model.is_measured(tier)
        and fitted.has_room(dataclasses.replace(settings, tier=tier))
    ]
    return min(unmeasured, key=lambda tier: tier_facts(tier).cost_rank, default=None)


def _why_kept(fitted: FittedTrial, now: Settings, cooldown_s: float) -> tuple[str, str] | None:
    """(binding, reason) where batch and tier are not up for change at all."""
    dials = f"batch {now.global_batch} and {now.tier.value}"
    if now.share == 0:
        return "paused", f"{dials} wait"
    if fitted.in_force is None:
        return "new", f"begins with {dials}"
    if fitted.trial.is_stale:
        return "stale", f"{dials} kept while its telemetry is stale"
    is_moved = fitted.in_force.share not in (now.share, 0)
    rest_s = _rest_s(fitted, cooldown_s)
    if is_moved or fitted.age_s < rest_s:
        what = "override" if fitted.trial.override is not None else "cooldown"
        why = f"changed {fitted.age_s:.1f} s ago, cooldown {rest_s:.1f} s"
        return ("share", f"{dials} kept while its share changes") if is_moved else (what, f"{dials} kept, {why}")
    prediction = fitted.predict(now)
    if prediction is None or not prediction.is_measured:
        return "unmeasured", f"{dials} kept until measured at micro-batch {now.micro_batch}"
    return None


def _rest_s(fitted: FittedTrial, cooldown_s: float) -> float:
    """Seconds for which its dials rest after a change."""
    trial = fitted.trial
    if not trial.throughput_per_s or trial.target_samples is None:
        return cooldown_s
    return min(cooldown_s, REST_PART * trial.target_samples / trial.throughput_per_s)


def _options(fitted: FittedTrial, now: Settings, goodput: float, min_gain: float) -> list[_Option]:
    """Every change of batch or of tier whose goodput can be predicted, with what it must gain."""
    options = []
    trial = fitted.trial
    # Without a noise scale nobody can say what another batch is worth.
    batches = () if fitted.noise is None else neighbours(now, trial.limits, trial.fit.micro_batch_cap)
    largest = fitted.largest_micro_batch
    if batches and now.micro_batch < largest < 2 * now.micro_batch:
        batches = (*batches, dataclasses.replace(now, micro_batch=largest))
    tiers = [dataclasses.replace(now, tier=tier) for tier in fitted.tiers if tier is not now.tier]
    for settings in (*batches, *tiers):
        predicted = fitted.goodput(settings)
        if predicted is not None:
            needed = _needed_gain(fitted, now, settings, min_gain)
            options.append(_Option(settings, predicted, predicted / goodput - 1, needed))
    return options


def _needed_gain(fitted: FittedTrial, now: Settings, other: Settings, min_gain: float) -> float:
    """What a change must gain: `min_gain`, and more than the doubt about the present speed and the scatter of both.

    A dearer tier must only be no slower beyond that scatter: a cheap one has to earn its place. Another batch must only
    promise more than the scatter as long as nobody of the shape has measured a second one: trying it tells what all are
    worth.
    """
    here, there = fitted.predict(now), fitted.predict(other)
    assert here is not None
    assert there is not None
    if other.tier is now.tier and not fitted.model.lines[now.tier].is_solved:
        return here.rel_scatter
    if is_cheaper(now.tier, other.tier):
        return math.hypot(here.rel_scatter, there.rel_scatter)
    return max(min_gain, math.hypot(here.rel_uncertainty, there.rel_scatter))


def _is_sure(fitted: FittedTrial, now: Settings, other: Settings, bounds: Bounds) -> bool:
    """Whether a change of batch still gains if the noise scale is off by its doubt, to the unfavourable side.

    For a smaller batch that side is also the one to which it moves by itself.
    """
    if other.global_batch == now.global_batch:
        return True
    is_larger = other.global_batch > now.global_batch
    doubted = dataclasses.replace(fitted, noise=bounds[0] if is_larger else NOISE_GROWTH * bounds[1])
    before, after = doubted.goodput(now), doubted.goodput(other)
    return before is not None and after is not None and after > before


def _is_wasteful(fitted: FittedTrial, now: Settings, other: Settings, bounds: Bounds) -> bool:
    """Whether a larger batch may make a sample worth less than is allowed, the noise scale being as low as it may."""
    is_larger = other.global_batch > now.global_batch
    return is_larger and fitted.wastes(other.global_batch, bounds[0])


def _way_back(fitted: FittedTrial, now: Settings, options: Iterable[_Option], bounds: Bounds) -> _Option | None:
    """The best smaller batch where the present one surely makes a sample worth less than is allowed; else None.

    Surely: at the highest noise scale that is possible too, so a batch that was let in is not sent back by the doubt.
    """
    if not fitted.wastes(now.global_batch, bounds[1]):
        return None
    return max((o for o in options if o.settings.global_batch < now.global_batch), key=_rank, default=None)


def _rank(option: _Option) -> tuple[float, int, str]:
    return (option.goodput, -option.settings.grad_accum, option.settings.tier.value)


def _rest(options: Iterable[_Option], chosen: Settings, now: Settings, goodput: float) -> tuple[Alternative, ...]:
    """What was weighed and not chosen, best first, the present settings among it."""
    weighed = [_Option(now, goodput, 0.0, 0.0), *options]
    others = sorted((o for o in weighed if o.settings != chosen), key=_rank, reverse=True)
    return tuple(Alternative(settings=o.settings, goodput=o.goodput) for o in others[:MAX_ALTERNATIVES])


def _why_best(now: Settings, goodput: float, options: list[_Option]) -> tuple[str, str]:
    dials = f"batch {now.global_batch} and {now.tier.value} kept"
    best = max(options, key=_rank, default=None)
    if best is None or best.gain <= 0:
        return f"{dials}: at {goodput:.1f} samples/s none of {len(options)} alternatives is better", "none"
    return (
        f"{dials}: the best of {len(options)} alternatives gains {best.gain:.1%}, less than {best.needed_gain:.1%}",
        "hysteresis",
    )


def _why_no_room(fitted: FittedTrial, now: Settings, refused: list[_Option]) -> tuple[str, str]:
    best = max(refused, key=_rank)
    line = fitted.memory_line(best.settings)
    assert line is not None
    needed, limit = line.needed_bytes(best.settings.micro_batch), fitted.trial.memory_limit_bytes
    other = f"micro-batch {best.settings.micro_batch} in {best.settings.tier.value}"
    return (
        f"batch {now.global_batch} and {now.tier.value} kept: {other} would gain {best.gain:.1%} but needs"
        f" {needed / 2**30:.2f} GiB per rank of {limit / 2**30:.2f}",
        "memory",
    )


def _why_wasteful(fitted: FittedTrial, now: Settings, best: _Option, bounds: Bounds) -> str:
    low, _ = bounds
    return (
        f"batch {now.global_batch} and {now.tier.value} kept: batch {best.settings.global_batch} would gain"
        f" {best.gain:.1%} but {_worth(fitted, best.settings.global_batch, low)}"
    )


def _why_smaller(fitted: FittedTrial, now: Settings, chosen: _Option, bounds: Bounds) -> str:
    other, (_, high) = chosen.settings, bounds
    return (
        f"batch {now.global_batch} -> {other.global_batch} ({other.micro_batch} x {other.grad_accum}): "
        f"{_worth(fitted, now.global_batch, high)}"
    )


def _worth(fitted: FittedTrial, global_batch: int, noise_scale: float) -> str:
    """What a sample is worth at that noise scale, against what it must."""
    base, limits = fitted.trial.start.global_batch, fitted.trial.limits
    return (
        f"a sample of {global_batch} is worth {efficiency(noise_scale, base, global_batch):.2f} of one of {base} at"
        f" noise scale {noise_scale:.0f}, less than {limits.min_efficiency:g}"
    )


def _why_unsure(now: Settings, best: _Option, bounds: Bounds) -> str:
    low, high = bounds
    return (
        f"batch {now.global_batch} and {now.tier.value} kept: batch {best.settings.global_batch} would gain"
        f" {best.gain:.1%}, or nothing: the noise scale lies between {low:.0f} and {high:.0f}"
    )


def _why_changed(fitted: FittedTrial, now: Settings, best: _Option) -> str:
    if best.settings.tier is not now.tier:
        change = f"tier {now.tier.value} -> {best.settings.tier.value}"
        found = next((fit for fit in fitted.trial.fit.tiers if fit.tier is best.settings.tier), None)
        if found is not None and found.noise_ratio is not None:
            change += f" (error {found.noise_ratio:.2g} of the batch's noise)"
    else:
        noise = 0.0 if fitted.noise is None else fitted.noise
        change = (
            f"batch {now.global_batch} -> {best.settings.global_batch} "
            f"({best.settings.micro_batch} x {best.settings.grad_accum}) at noise scale {noise:.0f}"
        )
    return f"{change}: goodput {best.goodput:.1f} samples/s, {best.gain:+.1%}"
