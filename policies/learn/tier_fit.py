"""What is known of the tiers of one trial, and which of them a policy may choose: measured, safe, and no emulation.

Where a trial has a guard (`orchestrator.train.precision`), a cheaper tier is chosen only once its probes found it safe,
and a tier that is emulated is never chosen. Without a guard nothing is known, and all allowed tiers may be tried.
Called by `policies.decide.fitted` and the policies; the facts arrive as `TrialFit.tiers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.policies.tier import Tier, is_cheaper


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFit:
    """What was found out about one tier on the trial's own device.

    Attributes:
        tier: the tier.
        is_real: whether the device has a unit for it; otherwise it is emulated, for study and not for speed.
        is_safe: whether the guard's probes found that learning does not suffer, or it is the dearest tier.
        step_s: calibrated seconds of one micro-batch, None where not calibrated; good for ratios between tiers only.
        memory_bytes: calibrated bytes kept for a backward pass (on a GPU: peak), None where not calibrated.
        noise_ratio: power of its error over the noise of the batch, of the last probe; None before the first.
        num_layers: linear layers of the model.
        num_in_tier: those whose shape allows the tier.
    """

    tier: Tier
    is_real: bool
    is_safe: bool
    step_s: float | None = None
    memory_bytes: float | None = None
    noise_ratio: float | None = None
    num_layers: int = 0
    num_in_tier: int = 0


def usable(allowed: Sequence[Tier], known: Sequence[TierFit], banned: Sequence[Tier], now: Tier) -> tuple[Tier, ...]:
    """The tiers a policy may choose: the present one, those dearer, and those cheaper that are real and safe.

    >>> usable((Tier.FP32, Tier.BF16), (), (), Tier.FP32)
    ('fp32', 'bf16')
    >>> usable((Tier.FP32, Tier.BF16), (TierFit(tier=Tier.BF16, is_real=True, is_safe=False),), (), Tier.FP32)
    ('fp32',)
    """
    found = {fit.tier: fit for fit in known}
    return tuple(tier for tier in allowed if tier not in banned and _is_usable(tier, found, now))


def _is_usable(tier: Tier, found: dict[Tier, TierFit], now: Tier) -> bool:
    if not found or not is_cheaper(tier, now):
        return True
    fit = found.get(tier)
    return fit is not None and fit.is_real and fit.is_safe


def step_ratio(known: Sequence[TierFit], tier: Tier, now: Tier) -> float | None:
    """Calibrated seconds in `tier` over those in `now`; None where either was not calibrated.

    >>> fits = [TierFit(tier=Tier.FP32, is_real=True, is_safe=True, step_s=0.4)]
    >>> step_ratio([*fits, TierFit(tier=Tier.BF16, is_real=True, is_safe=True, step_s=0.2)], Tier.BF16, Tier.FP32)
    0.5
    """
    seconds = {fit.tier: fit.step_s for fit in known}
    new_s, now_s = seconds.get(tier), seconds.get(now)
    return None if not new_s or not now_s else new_s / now_s


def numerical_efficiency(known: Sequence[TierFit], tier: Tier, noise_scale: float | None, global_batch: int) -> float:
    """Progress per sample in `tier` over that in fp32, within (0, 1]: its error adds to the noise of the batch.

    With an error of r times the batch's noise power a step is worth (B + phi) / (B + phi * (1 + r)) of one without, as
    long as the error has no bias; 1 / (1 + r), the least it can be, where the noise scale phi is not known.

    >>> bf16 = TierFit(tier=Tier.BF16, is_real=True, is_safe=True, noise_ratio=0.1)
    >>> round(numerical_efficiency([bf16], Tier.BF16, 100.0, 100), 4)
    0.9524
    """
    ratio = next((fit.noise_ratio for fit in known if fit.tier == tier), None) or 0.0
    if noise_scale is None:
        return 1 / (1 + ratio)
    return (global_batch + noise_scale) / (global_batch + noise_scale * (1 + ratio))


def best_usable(
    allowed: Sequence[Tier], known: Sequence[TierFit], banned: Sequence[Tier], now: Tier, min_gain: float
) -> Tier:
    """The usable tier with the least calibrated time per unit of progress, if it gains `min_gain`; else `now`.

    A dearer tier has to be no slower; one that is not calibrated is not chosen.
    """
    best, best_s = now, None
    for tier in usable(allowed, known, banned, now):
        ratio = step_ratio(known, tier, now)
        if ratio is None or tier is now:
            continue
        ratio /= numerical_efficiency(known, tier, None, 1) / numerical_efficiency(known, now, None, 1)
        needed = 1 / (1 + min_gain) if is_cheaper(tier, now) else 1.0
        if ratio <= needed and (best_s is None or ratio < best_s):
            best, best_s = tier, ratio
    return best
