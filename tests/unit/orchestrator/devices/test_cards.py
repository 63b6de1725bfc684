"""No two ranks of one trial are ever on one GPU, whatever Ray says, and all GPUs of a node are used alike."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from orchestrator.devices import ray_cards
from orchestrator.devices.cards import Seat, spread, visible
from orchestrator.devices.ray_alone import Alone


def seat(assigned: str, num_cards: int = 2, node_id: str = "n") -> Seat:
    return Seat(node_id=node_id, assigned=assigned, cards=tuple(str(number) for number in range(num_cards)))


def test_two_groups_that_ray_puts_on_one_gpu_each_use_both() -> None:
    assert spread([seat("0"), seat("0")]) == ("0", "1")
    assert spread([seat("1"), seat("1")]) == ("1", "0")
    assert visible([seat("1"), seat("1")]) == ("1,0", "0,1")


def test_what_ray_has_spread_stays_as_it_is() -> None:
    assert spread([seat("1"), seat("0")]) == ("1", "0")
    assert spread([seat("0"), seat("0", node_id="m")]) == ("0", "0"), "the same number on another node"


def test_a_node_with_too_few_gpus_is_left_to_the_slot_to_refuse() -> None:
    assert spread([seat("0", 1), seat("0", 1)]) == ("0", "0")


def test_the_assigned_gpu_is_among_those_that_are_seen_since_ray_train_looks_for_it() -> None:
    names = ("GPU-a", "GPU-b", "GPU-c")
    seats = [Seat(node_id="n", assigned="GPU-c", cards=names) for _ in range(2)]
    assert visible(seats) == ("GPU-c,GPU-a", "GPU-a,GPU-c")


@given(st.data(), st.integers(1, 8), st.integers(1, 3))
def test_no_two_ranks_of_a_group_are_on_one_gpu(data: st.DataObject, num_cards: int, num_nodes: int) -> None:
    node_ids = data.draw(st.lists(st.integers(0, num_nodes - 1), min_size=1, max_size=num_cards))
    numbers = st.integers(0, num_cards - 1)
    seats = [seat(str(data.draw(numbers)), num_cards, str(node_id)) for node_id in node_ids]
    own = spread(seats)
    assert len({(each.node_id, card) for each, card in zip(seats, own, strict=True)}) == len(seats)
    assert all(card in each.cards for each, card in zip(seats, own, strict=True))
    for rank, cards in enumerate(visible(seats)):
        assert cards.split(",")[0] == own[rank], "its own is cuda:0"
        assert seats[rank].assigned in cards.split(",")


@pytest.mark.parametrize("num_cards", [2, 4, 8])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_groups_that_fill_the_gpus_as_ray_fills_them_use_all_alike(num_cards: int, num_ranks: int) -> None:
    if num_ranks > num_cards:
        return
    # Each rank reserves 1 / num_ranks of a GPU, so Ray puts a whole group on one.
    used = Counter(card for first in range(num_cards) for card in spread([seat(str(first), num_cards)] * num_ranks))
    assert set(used.values()) == {num_ranks}


class Group:
    """A worker group of two ranks on one GPU, in this process."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def execute(self, _function: Any) -> list[Seat]:
        return [seat("1"), seat("1")]

    def execute_single_async(self, rank: int, function: Any, cards: str) -> str:
        function(cards)
        self.seen.append(f"{rank}: {os.environ['CUDA_VISIBLE_DEVICES']}")
        return ""


def test_ranks_see_their_own_gpu_before_ray_sets_torch_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    group, order = Group(), []

    class Stock:
        def on_start(self, _group: object, _config: object) -> None:
            order.extend(group.seen)

    monkeypatch.setattr("ray.get", lambda calls: calls)
    backend = ray_cards.OwnCardsBackend()
    monkeypatch.setattr(backend, "_torch", Stock())
    config = ray_cards.OwnCards()
    assert config.backend_cls is ray_cards.OwnCardsBackend
    backend.on_start(group, config)
    assert order == ["0: 1,0", "1: 0,1"]


def test_one_rank_has_no_group_but_the_card_that_ray_gave_it() -> None:
    config = Alone()
    assert config.backend_cls is Backend, "which does nothing"
    assert config.train_func_context is TorchConfig().train_func_context


def test_what_a_controller_loads_for_one_rank_holds_no_torch() -> None:
    code = "import pickle, sys; pickle.loads(sys.argv[1].encode('latin1')); sys.exit('torch' in sys.modules)"
    pickled = pickle.dumps(Alone(), 0).decode("latin1")
    assert subprocess.run([sys.executable, "-c", code, pickled], check=False).returncode == 0
