"""The one who asks the autoscaler for nodes, replayed against what a real Ray answered, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.clock import ManualClock
from orchestrator.node_requests import REPEAT_S, Bundles, NodeRequests, bundles_of
from orchestrator.node_watcher import type_of
from orchestrator.supervisor import away_from

TAPE = Path(__file__).parent / "node_requests_tape.json"
"""Ray 2.60.0 on one machine: the calls of a `NodeRequests`, their answers, what the autoscaler's store held (`seen`),
and what Ray Train's coordinator was told beside it (`train`). From 44 s to 50 s the calls were made to fail."""

SPOT = {"spot": {"CPU": 4.0, "GPU": 1.0}}
ONE: Bundles = [{"CPU": 4.0, "GPU": 1.0}]


class Ray:
    """The autoscaler's store: remembers the last call, or is away."""

    def __init__(self) -> None:
        self.calls: list[Bundles] = []
        self.is_away = False

    def __call__(self, bundles: Bundles) -> None:
        if self.is_away:
            raise ConnectionError("GCS is away")
        self.calls.append(bundles)


@pytest.fixture
def tape() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(TAPE.read_text())
    return recorded


def test_the_recorded_calls_are_made_again(tape: dict[str, Any]) -> None:
    clock, rows = ManualClock(), tape["rows"]
    calls: list[dict[str, Any]] = []
    answers = [row for row in rows if "call" in row]

    def ask(bundles: Bundles) -> None:
        recorded = answers[len(calls)]
        calls.append({"t_s": recorded["t_s"], "call": bundles, "answer": recorded["answer"]})
        if recorded["answer"] is not None:
            raise ConnectionError(recorded["answer"])

    requests = NodeRequests(tape["resources"], ask=ask, now_s=clock.now_s)
    for row in rows:
        clock.advance(max(0.0, row["t_s"] - clock.now_s()))
        if "want" in row:
            requests.want(row["want"])
        elif "release" in row:
            requests.release()
    assert calls == answers


def test_what_train_says_between_is_put_right_within_seconds(tape: dict[str, Any]) -> None:
    """Train's coordinator and the run write to one place; the run's wish is what stays there."""
    wrong_s: list[float] = []
    wanted: Bundles = []
    since_s: float | None = None
    for row in tape["rows"]:
        if row.get("want"):
            wanted = bundles_of(tape["resources"], row["want"])
        if row.get("seen") is None:
            continue
        if row["seen"] != wanted:
            since_s = row["t_s"]
        elif since_s is not None:
            wrong_s.append(row["t_s"] - since_s)
            since_s = None
    assert len(wrong_s) >= 4, "Train did speak in between"
    assert max(wrong_s) < REPEAT_S + 1.0
    assert tape["rows"][-1]["want"] == {"spot": 3, "big": 0}
    assert [row["seen"] for row in tape["rows"] if "seen" in row][-1] == [], "nothing is asked for behind the release"


def requests(clock: ManualClock) -> tuple[NodeRequests, Ray]:
    ray = Ray()
    return NodeRequests(SPOT, ask=ray, now_s=clock.now_s), ray


def test_a_wish_is_said_at_once_and_repeated() -> None:
    clock = ManualClock()
    asks, ray = requests(clock)
    asks.want({})
    assert ray.calls == [], "no wish was made yet"
    for _ in range(20):
        asks.want({"spot": 1})
        clock.advance(1.0)
    assert ray.calls == [ONE] * 4, "at 0, 5, 10 and 15 s"


def test_wishes_that_follow_each_other_fast_are_said_at_most_every_two_seconds() -> None:
    clock = ManualClock()
    asks, ray = requests(clock)
    for number in range(20):
        asks.want({"spot": number % 2})
        clock.advance(0.5)
    assert len(ray.calls) <= 6
    asks.want({"spot": 0})
    clock.advance(2.0)
    asks.want({"spot": 0})
    assert ray.calls[-1] == [], "the last wish wins"


def test_a_store_that_is_away_is_tried_again_later_and_later() -> None:
    clock = ManualClock()
    asks, ray = requests(clock)
    ray.is_away = True
    for _ in range(10):
        asks.want({"spot": 1})
        clock.advance(1.0)
    ray.is_away = False
    for _ in range(40):
        asks.want({"spot": 1})
        clock.advance(1.0)
    assert ray.calls[0] == ONE


def test_what_was_asked_for_is_released_once_and_for_good() -> None:
    clock = ManualClock()
    asks, ray = requests(clock)
    asks.want({"spot": 1})
    asks.release()
    asks.release()
    clock.advance(100.0)
    asks.want({"spot": 1})
    assert ray.calls == [ONE, []]


def test_a_run_that_asked_for_nothing_releases_nothing() -> None:
    asks, ray = requests(ManualClock())
    asks.release()
    assert ray.calls == []


def test_a_release_that_fails_is_repeated_and_then_given_up(caplog: pytest.LogCaptureFixture) -> None:
    asks, ray = requests(ManualClock())
    asks.want({"spot": 1})
    ray.is_away = True
    asks.release()
    assert "nodes.kept" in caplog.text


# Which node is of which type, and where slots do not go.

TYPES = {"spot": {"CPU": 4.0, "GPU": 1.0, "spot": 1.0}, "cpu": {"CPU": 8.0}}


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ({"Resources": {"CPU": 4.0, "GPU": 1.0, "spot": 1.0, "memory": 1e9}}, "spot"),
        ({"Resources": {"CPU": 4.0, "GPU": 1.0}}, ""),
        ({"Resources": {"CPU": 8.0, "memory": 1e9}, "Labels": {}}, "cpu"),
        ({"Resources": {"CPU": 8.0, "GPU": 1.0}}, ""),
        ({"Resources": {"CPU": 2.0}, "Labels": {"ray.io/node-group": "cpu"}}, "cpu"),
        ({"Resources": {"CPU": 8.0}, "Labels": {"ray.io/node-group": "other"}}, "cpu"),
        ({"Resources": {"CPU": 8.0, "node:__internal_head__": 1.0}}, ""),
        ({"Resources": {"CPU": 8.0}, "Labels": None}, "cpu"),
    ],
)
def test_a_node_is_of_the_type_that_its_label_or_its_resources_say(node: dict[str, Any], name: str) -> None:
    assert type_of(node, TYPES) == name


def test_slots_keep_off_nodes_that_are_let_go() -> None:
    assert away_from(frozenset()) is None
    assert away_from(frozenset({"b", "a"})) == {"ray.io/node-id": "!in(a,b)"}
