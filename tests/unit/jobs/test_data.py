"""Sampling by global sample number: every sample of an epoch exactly once, whatever the batch sizes and ranks were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.jobs.data import SampleCursor, epoch_order, micro_batches, rank_slice

steps = st.tuples(st.integers(0, 70), st.integers(1, 5), st.integers(1, 9))
"""Global batch, world size and micro-batch of one step."""


def consume(cursor: SampleCursor, history: list[tuple[int, int, int]]) -> tuple[list[int], SampleCursor]:
    """Train through a history as the loop does: take, cut by rank, cut by micro-batch; collect what was seen."""
    seen: list[int] = []
    for global_batch, world_size, micro_batch in history:
        indices, cursor = cursor.take(global_batch)
        for rank in range(world_size):
            for piece in micro_batches(rank_slice(indices, rank, world_size), micro_batch):
                assert len(piece) <= micro_batch
                seen += piece.tolist()
    return seen, cursor


@given(num_samples=st.integers(1, 60), seed=st.integers(0, 2**63), history=st.lists(steps, max_size=12))
def test_any_history_sees_every_sample_of_an_epoch_exactly_once(
    num_samples: int, seed: int, history: list[tuple[int, int, int]]
) -> None:
    seen, cursor = consume(SampleCursor(seed=seed, num_samples=num_samples), history)
    assert len(seen) == cursor.position == sum(batch for batch, _, _ in history)
    assert cursor.epoch * num_samples + cursor.offset == cursor.position
    for epoch in range(cursor.epoch):
        assert sorted(seen[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))
    rest = seen[cursor.epoch * num_samples :]
    assert len(set(rest)) == len(rest) == cursor.offset


@given(num_samples=st.integers(1, 60), history=st.lists(steps, max_size=12), cut=st.integers(0, 12))
def test_a_cursor_rebuilt_from_its_position_continues_the_same_stream(
    num_samples: int, history: list[tuple[int, int, int]], cut: int
) -> None:
    whole, _ = consume(SampleCursor(seed=3, num_samples=num_samples), history)
    before, cursor = consume(SampleCursor(seed=3, num_samples=num_samples), history[:cut])
    resumed = SampleCursor(seed=3, num_samples=num_samples, position=cursor.position)
    after, _ = consume(resumed, history[cut:])
    assert before + after == whole


@given(count=st.integers(0, 200), world_size=st.integers(1, 9))
def test_parts_of_the_ranks_follow_each_other_and_differ_by_at_most_one(count: int, world_size: int) -> None:
    indices = np.arange(count)
    parts = [rank_slice(indices, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_taking_across_an_epoch_end_joins_two_different_orders() -> None:
    indices, cursor = SampleCursor(seed=0, num_samples=50, position=40).take(20)
    assert indices.tolist() == epoch_order(0, 0, 50)[40:].tolist() + epoch_order(0, 1, 50)[:10].tolist()
    assert (cursor.epoch, cursor.offset) == (1, 10)
    assert epoch_order(0, 0, 50).tolist() != epoch_order(0, 1, 50).tolist() != epoch_order(1, 1, 50).tolist()


def test_one_take_may_span_several_epochs() -> None:
    indices, cursor = SampleCursor(seed=0, num_samples=7).take(24)
    assert np.bincount(indices).tolist() == [len(np.flatnonzero(indices == sample)) for sample in range(7)]
    assert sorted(indices[:21].tolist()) == sorted(list(range(7)) * 3)
    assert cursor.epoch == 3


def test_the_order_of_an_epoch_never_changes_between_releases() -> None:
    assert epoch_order(7, 2, 10).tolist() == [8, 6, 4, 0, 5, 7, 1, 3, 9, 2]


def test_what_take_returns_may_be_written_to_without_harm() -> None:
    indices, _ = SampleCursor(seed=0, num_samples=10).take(10)
    expected = indices.copy()
    indices[:] = -1
    again, _ = SampleCursor(seed=0, num_samples=10).take(10)
    assert again.tolist() == expected.tolist()


def test_the_cached_order_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1, "num_samples": 1}, "seed=-1; allowed: >= 0"),
        ({"seed": 0, "num_samples": 0}, "num_samples=0; allowed: >= 1"),
        ({"seed": 0, "num_samples": 1, "position": -5}, "position=-5; allowed: >= 0"),
    ],
)
def test_an_impossible_cursor_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleCursor(**fields)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="count=-1"):
        SampleCursor(seed=0, num_samples=3).take(-1)
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        rank_slice(np.arange(4), 2, 2)
    with pytest.raises(ValueError, match="micro_batch=0"):
        micro_batches(np.arange(4), 0)
