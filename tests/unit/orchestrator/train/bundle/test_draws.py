"""Masks of dropout: a member's own, whoever else is in the bundle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orchestrator.train.bundle.draws import Draws

SHAPE = torch.Size((64, 32))


def masks(seeds: list[int], steps: list[float], rates: list[float], part: int = 0) -> Tensor:
    """Of the first dropout layer, as a GPU computes them."""
    draws = Draws([], torch.tensor(seeds), torch.tensor(steps))
    draws.begin(torch.tensor([part]))
    draws._site = 1
    return draws._counted(SHAPE, torch.tensor(rates))


def test_a_counted_mask_depends_on_the_members_own_seed_and_step_alone() -> None:
    together = masks([7, 8, 9], [3.0, 0.0, 5.0], [0.1, 0.5, 0.3])
    assert torch.equal(together[0], masks([7], [3.0], [0.1])[0])
    assert torch.equal(together[2], masks([1, 9], [0.0, 5.0], [0.9, 0.3])[1])
    for other in (masks([6], [3.0], [0.1]), masks([7], [4.0], [0.1]), masks([7], [3.0], [0.1], part=1)):
        assert not torch.equal(together[0], other[0])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_a_counted_mask_keeps_as_much_as_its_rate_says(rate: float) -> None:
    kept = torch.stack([masks([seed], [0.0], [rate])[0] for seed in range(40)]).double()
    assert kept.mean().item() == pytest.approx(1 - rate, abs=0.006)
    if rate:
        neighbours = (kept[:, :, 1:] - kept.mean()) * (kept[:, :, :-1] - kept.mean())
        assert abs(neighbours.mean().item()) < 0.01 * kept.var().item() + 1e-9


def test_on_a_cpu_masks_are_those_of_the_members_own_generators() -> None:
    own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    draws = Draws(own, torch.zeros(3), torch.zeros(3))
    found = draws.keep(SHAPE, torch.tensor([0.25, 0.0, 0.0]))
    assert torch.equal(found[0], torch.empty(SHAPE).bernoulli_(0.75, generator=torch.Generator().manual_seed(1)))
    assert bool((found[1:] == 1).all())
    assert torch.equal(own[1].get_state(), torch.Generator().manual_seed(2).get_state())  # nothing was drawn
