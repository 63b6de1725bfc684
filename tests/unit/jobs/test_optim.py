"""AdamW takes the fused kernel on devices that have it and another form elsewhere, with the same numbers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from orchestrator.jobs.optim import adamw


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults["fused"])


def test_plain_parameters_take_the_fused_kernel() -> None:
    assert is_fused(adamw(nn.Linear(2, 2), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1))


def test_parameters_on_a_device_without_the_kernel_do_not() -> None:
    assert not is_fused(adamw(nn.Linear(2, 2, device="meta"), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1))


def test_both_forms_compute_the_same() -> None:
    torch.manual_seed(0)
    fused_model = nn.Linear(5, 3)
    other_model = copy.deepcopy(fused_model)
    fused = adamw(fused_model, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    other = adamw(other_model, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for group in other.param_groups:
        group["fused"], group["foreach"] = False, True
    inputs = torch.randn(20, 4, 5)
    for batch in inputs:
        for model, optimizer in ((fused_model, fused), (other_model, other)):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused_model.weight, other_model.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fused_model.bias, other_model.bias, atol=1e-6, rtol=1e-5)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = adamw(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
