"""How a run ends, as far as that needs no cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import run


class Policy:
    """Answers one status after the other, and the last one for ever."""

    def __init__(self, *states: list[str]) -> None:
        self._states, self.num_asked = list(states), 0
        self.status = SimpleNamespace(remote=self._answer)

    def _answer(self) -> dict[str, Any]:
        self.num_asked += 1
        states = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return {"trials": [{"state": state} for state in states]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr(run, "_POLL_S", 0.0)


def test_a_trial_that_is_leaving_its_slot_when_the_search_is_over_is_waited_for() -> None:
    policy = Policy(["running", "stopped"], ["running", "stopped"], ["done", "stopped"])
    assert run._last_states(SimpleNamespace(policy=policy)) == ["done", "stopped"]  # type: ignore[arg-type]
    assert policy.num_asked == 3


def test_a_trial_that_never_leaves_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_LEAVE_S", 0.0)
    assert run._last_states(SimpleNamespace(policy=Policy(["running"]))) == ["running"]  # type: ignore[arg-type]
