"""The loss scale of fp16: halves on overflow, doubles after long, and only in fp16."""

from __future__ import annotations

import torch

from orchestrator.policies.tier import Tier
from orchestrator.train.precision.loss_scale import GROWTH_STEPS, INITIAL_SCALE, LossScale


def test_only_fp16_is_scaled() -> None:
    scale = LossScale()
    assert scale.factor(Tier.FP16) == INITIAL_SCALE
    assert scale.factor(Tier.BF16) == 1.0
    gradient = torch.ones(3)
    scale.unscale(Tier.BF16, [gradient])
    assert gradient.tolist() == [1.0, 1.0, 1.0]


def test_gradients_are_divided_by_the_scale_and_empty_shards_are_passed_over() -> None:
    scale = LossScale(scale=4.0)
    gradient = torch.full((3,), 8.0)
    scale.unscale(Tier.FP16, [gradient, torch.empty(0)])
    assert gradient.tolist() == [2.0, 2.0, 2.0]


def test_it_backs_off_on_overflow_and_grows_after_long() -> None:
    scale = LossScale(scale=8.0)
    scale.update(Tier.FP16, is_skipped=True)
    assert scale.scale == 4.0
    for _ in range(GROWTH_STEPS):
        scale.update(Tier.FP16, is_skipped=False)
    assert (scale.scale, scale.good_steps) == (8.0, 0)
    scale.update(Tier.FP32, is_skipped=True)
    assert scale.scale == 8.0


def test_a_checkpoint_keeps_it_and_an_older_one_begins_anew() -> None:
    scale = LossScale(scale=32.0, good_steps=7)
    assert LossScale.restored(scale.state()) == scale
    assert LossScale.restored(None) == LossScale()
