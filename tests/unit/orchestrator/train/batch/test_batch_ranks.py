"""Batches over two ranks: the same losses however one is cut, noise as it is, a rank that runs out of memory."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.multiprocessing.spawn import start_processes

from tests.unit.orchestrator.train.batch.batch_ranks import OVERFLOWS, WORLD_SIZE, main

Results = dict[str, Any]

pytestmark = pytest.mark.timeout(240)  # two processes start torch, on a machine that may be busy


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of two ranks found."""
    directory = tmp_path_factory.mktemp("batch_ranks")
    start_processes(main, args=(str(directory),), nprocs=WORLD_SIZE)  # type: ignore[no-untyped-call]
    return [json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def test_a_global_batch_gives_the_same_losses_however_it_is_cut(both: list[Results]) -> None:
    losses = both[0]["alone"] + both[0]["splits"]
    assert len(losses) == 7
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("kind", ["PaddedText", "Unrandom"])
def test_a_declared_training_has_the_same_gradients_on_two_ranks(both: list[Results], kind: str) -> None:
    """Text whose number of words each rank knows for its own part only, and tied weights; a mean over samples."""
    alone, first = both[0]["declared"][kind]
    (second,) = both[1]["declared"][kind]
    assert first == second
    np.testing.assert_allclose(first, alone, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_noise_between_ranks_is_that_of_the_true_covariance(both: list[Results], optimizer: str) -> None:
    found = both[0]["noise"][optimizer]
    assert found == both[1]["noise"][optimizer], "every rank finds the same"
    trace, grad_sq = found["truth"]
    draws = found["draws"]
    assert statistics.fmean(t for t, _ in draws) == pytest.approx(trace, rel=0.1)
    assert statistics.fmean(g for _, g in draws) == pytest.approx(grad_sq, rel=0.15)
    scales = [
        sum(t for t, _ in draws[i : i + 60]) / sum(g for _, g in draws[i : i + 60]) for i in range(0, len(draws), 60)
    ]
    assert statistics.median(scales) == pytest.approx(trace / grad_sq, rel=0.25)


@pytest.mark.parametrize(("place", "at"), OVERFLOWS)
def test_two_ranks_begin_again_where_one_ran_out_of_memory(both: list[Results], place: str, at: int) -> None:
    results = [rank[f"{place}-{at}"] for rank in both]
    assert [result["fired"] for result in results] == [0, 1]
    assert results[0]["statuses"] == ["memory", "done"]
    assert "ran out of memory" in results[0]["reasons"][0]
    assert results[0]["away_s"] < 15
    for rank in range(WORLD_SIZE):
        undisturbed, records = both[rank]["undisturbed"]["records"], results[rank]["records"]
        failed = next(i for i in range(1, len(records)) if records[i][0] <= records[i - 1][0] or records[i][3] == 2)
        begun_again = records[failed][0]
        assert begun_again == (0 if at < 20 else 20), "the last commit"
        course = records[:begun_again] + records[failed:]
        assert {row[3] for row in records[failed:]} == {2}
        assert [row[:3] for row in course] == [row[:3] for row in undisturbed], "the same samples, each once"
        np.testing.assert_allclose([row[4] for row in course], [row[4] for row in undisturbed], rtol=1e-5)


def test_a_trial_left_alone_says_nothing_of_memory(both: list[Results], tmp_path: Path) -> None:
    assert both[0]["undisturbed"]["statuses"] == ["done"]
    assert len(both[0]["undisturbed"]["records"]) == 40
