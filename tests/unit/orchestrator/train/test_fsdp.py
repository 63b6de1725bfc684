"""Sharding as one rank sees it, and how blocks are grouped into units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.train import fsdp


def test_one_rank_leaves_the_model_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    before = [id(p) for p in model.parameters()]
    assert fsdp.shard(model, list(model), None) == 0
    assert type(model) is nn.Sequential
    assert [id(p) for p in model.parameters()] == before
    fsdp.set_gradient_sync(model, False)


def test_clipping_returns_the_norm_before_it_and_leaves_the_limit() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(fsdp.clip_and_norm(model.parameters(), None)) == pytest.approx(5.0)
    assert float(fsdp.clip_and_norm(model.parameters(), 1.0)) == pytest.approx(5.0)
    assert float(fsdp.clip_and_norm(model.parameters(), None)) == pytest.approx(1.0, rel=1e-4)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[float("nan"), 4.0]])
    assert not torch.isfinite(fsdp.clip_and_norm(model.parameters(), 1.0))


def test_parameters_without_a_gradient_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    assert [grad.shape for grad in fsdp.local_grads(model.parameters())] == [(1, 2), (1,)]
    assert float(fsdp.sum_sq([], None)) == 0.0


def test_full_parameters_carry_names_and_no_gradient() -> None:
    model = nn.Linear(2, 1)
    named = dict(fsdp.full_named_parameters(model))
    assert list(named) == ["weight", "bias"]
    assert not any(value.requires_grad for value in named.values())


def test_small_blocks_share_a_unit_and_a_short_rest_goes_to_the_root() -> None:
    assert fsdp.group_blocks([4, 4, 4, 4, 4], 8) == [(0, 2), (2, 4)]
    assert fsdp.group_blocks([9, 1, 9], 8) == [(0, 1), (1, 3)]
    assert fsdp.group_blocks([1, 1, 1], 100) == []
    assert fsdp.group_blocks([5, 5], 10) == []
    assert fsdp.group_blocks([5, 5, 1], 10) == [(0, 2)]
    assert fsdp.group_blocks([], 1) == []


@given(sizes=st.lists(st.integers(0, 50), max_size=30), least=st.integers(1, 100))
def test_units_follow_each_other_and_are_large_enough(sizes: list[int], least: int) -> None:
    units = fsdp.group_blocks(sizes, least)
    position = 0
    for start, stop in units:
        assert start == position
        assert sum(sizes[start:stop]) >= least
        assert sum(sizes[start : stop - 1]) < least
        position = stop
    assert sum(sizes[position:]) < least or len(units) == 0
