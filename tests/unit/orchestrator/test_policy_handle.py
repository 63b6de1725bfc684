"""How a shared policy actor is called: each call goes to one run, and looks like a call of an actor of its own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from orchestrator.policy_handle import RunHandle, policy_at


class Calls:
    """An actor that notes what it is called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.call = self

    def remote(self, *arguments: Any) -> int:
        self.seen.append(arguments)
        return len(self.seen)


def test_a_call_goes_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Calls()
    asked: list[tuple[str, str]] = []

    def get_actor(name: str, namespace: str) -> Calls:
        asked.append((name, namespace))
        return actor

    monkeypatch.setattr("orchestrator.policy_handle.ray.get_actor", get_actor)
    handle = policy_at("policy#r1", "somewhere")
    assert handle.submit.remote("t0", {"lr": 0.1}) == 1
    assert actor.seen == [("r1", "submit", "t0", {"lr": 0.1})]
    assert policy_at("policy", "elsewhere") is actor
    assert asked == [("policy", "somewhere"), ("policy", "elsewhere")]


def test_a_handle_can_be_sent_to_another_process() -> None:
    handle = pickle.loads(pickle.dumps(RunHandle("actor", "r1")))
    assert (handle.actor, handle.run) == ("actor", "r1")
