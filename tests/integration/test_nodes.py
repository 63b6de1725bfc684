"""Nodes are added and removed during a search; nothing is lost, and what is free is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.node_story import Nodes, tell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    return tell(tmp_path_factory.mktemp("nodes"))


def test_nothing_was_lost_on_the_way(story: Nodes) -> None:
    assert story.violations == []
    assert story.run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
    assert {trial["state"] for trial in story.run.status["trials"]} == {"queued"}, "both can be resumed"


def test_a_node_that_joins_is_in_the_ledger_and_then_trained_on(story: Nodes) -> None:
    # How soon is measured in tests/bench/bench_cluster.py; here only that it happened, and in this order.
    assert story.times["joined -> in the ledger"] < story.times["joined -> first step on it"]


def test_a_draining_node_costs_no_step(story: Nodes) -> None:
    (entry,) = story.drained
    assert Path(entry["checkpoint"]).name.startswith("step-")
    assert "interrupted" in entry["reason"]
    assert entry["num_restarts"] == 0


def test_a_lost_node_costs_no_trial_and_no_restart(story: Nodes) -> None:
    assert story.lost
    assert all(entry["num_restarts"] == 0 for entry in story.lost)
    assert all(entry["checkpoint"] for entry in story.lost)


def test_the_policy_actor_is_on_the_head_node(story: Nodes) -> None:
    assert story.actor_node == story.head_node
