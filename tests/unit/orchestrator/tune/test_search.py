"""What searchers and schedulers propose stays within the search space, whichever they are."""

from __future__ import annotations

import logging
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers.pbt import _explore

from orchestrator.config import load_config
from orchestrator.config.model import RunConfig
from orchestrator.config.space import Distribution
from orchestrator.tune import search
from orchestrator.tune.adapter import within
from orchestrator.tune.search import bounds_of, domain, mutation, scheduler_of

SPACE = {
    "a": Distribution(uniform=(0.9, 0.999)),
    "b": Distribution(loguniform=(1e-3, 0.3)),
    "c": Distribution(randint=(2, 5)),
    "d": Distribution(choice=(1, 2, 4)),
    "e": Distribution(grid=("x", "y")),
}


def is_inside(params: dict[str, Any]) -> bool:
    listed = params["d"] in (1, 2, 4) and params["e"] in ("x", "y")
    return bool(listed and 0.9 <= params["a"] <= 0.999 and 1e-3 <= params["b"] <= 0.3 and 2 <= params["c"] <= 4)


def test_population_based_training_never_leaves_the_search_space() -> None:
    """Ray Tune multiplies by 0.8 and 1.2; three of four trials of such a search had failed."""
    mutations = {name: mutation(distribution) for name, distribution in SPACE.items()}
    explore = _explorer()
    random.seed(0)
    params: dict[str, Any] = {"a": 0.99, "b": 0.1, "c": 3, "d": 2, "e": "x"}
    has_left = False
    for _ in range(300):
        params, _ = _explore(params, mutations, 0.25, (1.2, 0.8), None)
        has_left |= not is_inside(params)
        params = explore(params)
        assert is_inside(params), params
        assert isinstance(params["c"], int)
    assert has_left, "this test would say nothing"


def _explorer() -> Any:
    config = RunConfig.model_validate(
        {
            "name": "a",
            "job": {"name": "mlp"},
            "search": {"space": SPACE, "num_trials": 4, "scheduler": {"name": "pbt", "mutate": list(SPACE)}},
        },
        strict=False,
    )
    scheduler = scheduler_of(config)
    return pickle.loads(pickle.dumps(scheduler._custom_explore_fn))  # Tune keeps it with its state


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_value_beyond_an_end_is_that_end(name: str) -> None:
    low, high = bounds_of(SPACE)[name]
    for value, taken in ((low, low), (high, high), (low - 1, low), (high + 1, high), (high * (1 + 1e-16), high)):
        assert within(bounds_of(SPACE), {name: value, "other": 9.0}) == {name: taken, "other": 9.0}


def test_what_ray_tune_draws_is_left_as_it_is() -> None:
    for name in ("a", "b", "c"):
        for _ in range(200):
            drawn = {name: domain(SPACE[name]).sample()}
            assert within(bounds_of(SPACE), drawn) == pytest.approx(drawn)


def test_the_ends_of_a_space_are_checked_against_the_job(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\njob: {name: mlp}\nsearch: {space: {lr: {uniform: [-1.0, 0.1]}}}\n")
    with pytest.raises(Exception, match=r"search\.space\.lr: got -1\.0"):
        load_config(tmp_path / "run.yaml", [])


def test_tunes_word_of_a_failed_trial_is_dropped_and_all_else_is_not() -> None:
    def record(text: str, error: Exception | None = None) -> logging.LogRecord:
        told = None if error is None else (type(error), error, None)
        return logging.LogRecord("ray.tune.tune", logging.ERROR, "", 0, text, (), told)

    failed = RuntimeError("ray::train()\n  adapter.py\norchestrator.tune.adapter.TrialFailedError: NameError: x")
    assert not search._is_news(record("Trial task failed for trial SlotTrial_1", failed))
    assert not search._is_news(record("Trials did not complete: %s"))
    assert search._is_news(record("Trial task failed for trial SlotTrial_1", RuntimeError("the actor is away")))
    assert search._is_news(record("the disk is full"))
