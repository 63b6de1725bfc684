"""Exact sampling through loader processes and streams, over random histories of batches, ranks, faults and restarts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.jobs.data import SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.loading import MapLoader, StreamReader

WHAT = ("step", "step", "step", "skipped", "overflow", "commit", "crash")
events = st.lists(
    st.tuples(st.sampled_from(WHAT), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9)), max_size=24
)
"""What happens, global batch, ranks, micro-batch."""


class Squares:
    """Sample i is i squared."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return index * index


def course(cursor: SampleCursor, history: list[tuple[str, int, int, int]], fetch: object) -> list[int]:
    """Numbers trained on in the course that survives: a crash goes back to the last commit."""
    seen: list[int] = []
    committed: tuple[SampleCursor, int] = (cursor, 0)
    for what, global_batch, world_size, micro_batch in history:
        if what == "commit":
            committed = (cursor, len(seen))
        elif what == "crash":
            cursor = SampleCursor(
                seed=cursor.seed,
                num_samples=cursor.num_samples,
                position=committed[0].position,
                shuffle_block=cursor.shuffle_block,
            )
            del seen[committed[1] :]
        else:
            indices, after = cursor.take(global_batch)
            tries = [micro_batch, max(1, micro_batch // 2)] if what == "overflow" else [micro_batch]
            for size in tries:  # an overflow does the step again, in smaller pieces
                done: list[int] = []
                for rank in range(world_size):
                    for piece in micro_batches(rank_slice(indices, rank, world_size), size):
                        samples = fetch(piece)  # type: ignore[operator]
                        assert samples == [int(number) ** 2 for number in piece]
                        done += piece.tolist()
            if what != "skipped":
                cursor, seen = after, seen + done
    return seen


def check_epochs(seen: list[int], num_samples: int) -> None:
    """Every sample of a whole epoch exactly once, of the last one at most once."""
    for start in range(0, len(seen), num_samples):
        epoch = seen[start : start + num_samples]
        assert len(set(epoch)) == len(epoch)
        assert all(0 <= number < num_samples for number in epoch)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_samples=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    block=st.one_of(st.none(), st.integers(1, 30)),
    history=events,
)
def test_a_thousand_histories_of_batches_ranks_and_faults_train_on_each_sample_of_an_epoch_once(
    num_samples: int, seed: int, block: int | None, history: list[tuple[str, int, int, int]]
) -> None:
    cursor = SampleCursor(seed=seed, num_samples=num_samples, shuffle_block=block)
    reader = StreamReader(lambda start: itertools.islice((i * i for i in range(num_samples)), start, None), window=70)
    fetch = MapLoader(Squares(num_samples)).fetch if block is None else reader.fetch
    check_epochs(course(cursor, history, fetch), num_samples)


def test_loader_processes_give_the_same_samples_whatever_was_prefetched() -> None:
    cursor = SampleCursor(seed=3, num_samples=50)
    seen: list[int] = []
    with MapLoader(Squares(50), num_processes=2) as loader:
        for global_batch in (8, 8, 12, 6, 16):
            indices, cursor = cursor.take(global_batch)
            parts = micro_batches(indices, 4)
            for part in parts:
                assert loader.fetch(part) == [int(number) ** 2 for number in part]
                seen += part.tolist()
            loader.prefetch(micro_batches(cursor.take(global_batch)[0], 4))  # the next step may be another one
        with pytest.raises(IndexError):
            loader.fetch([77])
    assert sorted(seen) == list(range(50))


def test_a_block_is_permuted_by_itself_and_the_last_one_is_shorter() -> None:
    indices, _ = SampleCursor(seed=1, num_samples=25, shuffle_block=10).take(25)
    for start, stop in ((0, 10), (10, 20), (20, 25)):
        assert sorted(indices[start:stop].tolist()) == list(range(start, stop))
    in_order, _ = SampleCursor(seed=1, num_samples=7, shuffle_block=1).take(9)
    assert in_order.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert indices.dtype == np.int64


def test_an_endless_stream_needs_no_permutation_of_all_of_it() -> None:
    cursor = SampleCursor(seed=0, num_samples=2**62, position=10**9, shuffle_block=16)
    indices, after = cursor.take(40)
    assert len(set(indices.tolist())) == 40
    assert after.position == 10**9 + 40


def test_a_stream_is_opened_again_only_for_what_is_behind_its_window() -> None:
    opened: list[int] = []

    def open_at(start: int) -> Iterator[int]:
        opened.append(start)
        return itertools.count(start)

    reader = StreamReader(open_at, window=4)
    assert reader.fetch([3, 1, 9, 6]) == [3, 1, 9, 6]
    assert opened == [0]
    assert reader.fetch([0]) == [0]
    assert opened == [0, 0]
    reader = StreamReader(lambda start: iter(range(start, 5)), window=4)
    with pytest.raises(IndexError, match="ended at sample 5, before sample 6"):
        reader.fetch([6])


@pytest.mark.parametrize("wrong", [{"num_processes": -1}, {"keep": 0}])
def test_impossible_loaders_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        MapLoader(Squares(1), **wrong)
    with pytest.raises(ValueError, match="window=0"):
        StreamReader(iter, window=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shuffle_block=0"):
        SampleCursor(seed=0, num_samples=1, shuffle_block=0)
