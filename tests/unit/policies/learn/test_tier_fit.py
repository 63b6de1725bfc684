"""Which tiers of a guarded trial a policy may choose, and what they are predicted to bring."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.learn.fit import NOTHING_FITTED, note_tiers
from orchestrator.policies.learn.tier_fit import TierFit, best_usable, numerical_efficiency, step_ratio, usable
from orchestrator.policies.tier import Tier

FIXED = Tier("fixed(8,16)")
LADDER = (Tier.FP32, Tier.BF16, Tier.INT8, FIXED)
KNOWN = (
    TierFit(tier=Tier.FP32, is_real=True, is_safe=True, step_s=1.0),
    TierFit(tier=Tier.BF16, is_real=True, is_safe=True, step_s=0.5, noise_ratio=0.001),
    TierFit(tier=Tier.INT8, is_real=True, is_safe=False, step_s=0.4, noise_ratio=0.06),
    TierFit(tier=FIXED, is_real=False, is_safe=True, step_s=0.1),
)


def test_a_cheaper_tier_must_be_safe_and_real() -> None:
    assert usable(LADDER, KNOWN, (), Tier.FP32) == (Tier.FP32, Tier.BF16)
    assert usable(LADDER, KNOWN, (Tier.BF16,), Tier.FP32) == (Tier.FP32,)
    assert usable(LADDER, KNOWN, (), Tier.INT8) == (Tier.FP32, Tier.BF16, Tier.INT8), "up is always open"
    assert usable(LADDER, (), (), Tier.FP32) == LADDER, "where nothing guards, all that is allowed"


def test_the_fastest_usable_tier_is_taken_if_it_gains_enough() -> None:
    assert best_usable(LADDER, KNOWN, (), Tier.FP32, 0.05) is Tier.BF16
    slow = (KNOWN[0], dataclasses.replace(KNOWN[1], step_s=0.97), *KNOWN[2:])
    assert best_usable(LADDER, slow, (), Tier.FP32, 0.05) is Tier.FP32
    safe = (*KNOWN[:2], dataclasses.replace(KNOWN[2], is_safe=True), KNOWN[3])
    assert best_usable(LADDER, safe, (), Tier.FP32, 0.05) is Tier.INT8
    assert best_usable(LADDER, (), (), Tier.FP32, 0.05) is Tier.FP32, "nothing is assumed"


def test_ratios_need_both_calibrations() -> None:
    assert step_ratio(KNOWN, Tier.BF16, Tier.FP32) == pytest.approx(0.5)
    assert step_ratio(KNOWN[:1], Tier.BF16, Tier.FP32) is None


def test_an_error_costs_progress_the_more_the_noisier_the_batch() -> None:
    assert numerical_efficiency(KNOWN, Tier.FP32, 100.0, 10) == 1.0
    few, many = (numerical_efficiency(KNOWN, Tier.INT8, 100.0, batch) for batch in (10, 1000))
    assert numerical_efficiency(KNOWN, Tier.INT8, None, 10) < few < many < 1.0


def test_a_fit_holds_what_was_said_last() -> None:
    fit = note_tiers(note_tiers(NOTHING_FITTED, KNOWN[:1]), KNOWN)
    assert fit.tiers == KNOWN
