"""A paused trial's state in host memory: given back, and the same afterwards, for whoever holds a reference."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.train.offload import Offload


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 8), nn.Linear(8, 2)
    last.bias = nn.Parameter(first.bias.data[:2])  # shares its storage with another parameter
    model = nn.Sequential(first, nn.BatchNorm1d(8), last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_state_comes_back_as_it_was_and_trains_on() -> None:
    model, optimizer = trained()
    other, other_optimizer = trained()
    held = list(model.parameters())
    before = [param.detach().clone() for param in held]
    offload = Offload(model, optimizer, from_host=True)
    assert Offload(model, optimizer).away() == 0, "on a host there is nothing to give back"
    assert offload.away() > 0
    assert offload.is_away
    assert all(param.untyped_storage().nbytes() == 0 for param in held)
    assert offload.away() == 0, "twice is once"
    offload.back()
    offload.back()
    assert not offload.is_away
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    for one, opt in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        one(torch.randn(6, 4)).square().sum().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
