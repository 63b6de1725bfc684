"""A sample of the simulated schedules; `make chaos` plays three hundred of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.control import transition
from orchestrator.control.engine import Engine
from orchestrator.control.events import Event, Reported
from orchestrator.control.world import Trial, World
from orchestrator.errors import JournalError
from tests.chaos.__main__ import Schedule, part_of, played, schedules
from tests.chaos.simulated import KINDS, simulate

NUM_EACH = 3


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_disturbed_run_loses_and_doubles_nothing(tmp_path: Path, kind: str) -> None:
    for seed in range(NUM_EACH):
        fired, violations = simulate(tmp_path / str(seed), kind, seed)
        assert fired, f"seed {seed}: it has struck"
        assert violations == [], f"seed {seed}: {fired}"


def test_a_schedule_is_the_same_each_time_it_is_played(tmp_path: Path) -> None:
    played_twice = [simulate(tmp_path / name, "slot lost", 7) for name in ("a", "b")]
    assert played_twice[0] == played_twice[1]
    journals = [(tmp_path / name / "journal.jsonl").read_text().count("\n") for name in ("a", "b")]
    assert journals[0] == journals[1]


def test_parts_are_all_of_it_once_and_each_has_every_kind() -> None:
    every = schedules(20, 2)
    parts = [part_of(every, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(each for part in parts for each in part) == sorted(every)
    assert all({each.kind for each in part} >= set(KINDS) for part in parts)
    with pytest.raises(ValueError, match="allowed: k/n"):
        part_of(every, "4/3")


def test_what_was_played_is_not_played_again_and_a_torn_line_is(tmp_path: Path) -> None:
    line = json.dumps({"seed": 1, "what": "simulated", "kind": "zombie", "violations": []})
    (tmp_path / "results.jsonl").write_text(line + "\n" + line[:20])
    assert played(tmp_path / "results.jsonl") == {Schedule(1, "simulated", "zombie")}
    assert played(tmp_path / "none.jsonl") == set()


def _no_fence(patch: pytest.MonkeyPatch) -> None:
    def attempt_in(self: World, slot_id: str, _epoch: int, _attempt: object) -> Trial | None:
        slot = self.slots.get(slot_id)
        return None if slot is None else self.trial_in(slot)

    patch.setattr(World, "attempt_in", attempt_in)


def _no_number(patch: pytest.MonkeyPatch) -> None:
    """Reports are taken as often as they come."""
    rule = transition._RULES[Reported]
    patch.setitem(transition._RULES, Reported, (lambda _world, _run, _event: None, rule[1]))


def _no_order(patch: pytest.MonkeyPatch) -> None:
    """What is told takes effect although its entry was refused."""
    plain = Engine._append

    def append(self: Engine, events: list[Event]) -> None:
        with suppress(JournalError):
            plain(self, events)

    patch.setattr(Engine, "_append", append)


@pytest.mark.parametrize(
    ("remove", "kind"), [(_no_fence, "zombie"), (_no_number, "told twice"), (_no_order, "journal: refused")]
)
def test_a_guard_that_is_removed_is_missed(
    tmp_path: Path, remove: Callable[[pytest.MonkeyPatch], None], kind: str
) -> None:
    def is_red(seed: int) -> bool:
        try:
            return bool(simulate(tmp_path / str(seed), kind, seed)[1])
        except (Exception, pytest.fail.Exception):
            return True

    with pytest.MonkeyPatch.context() as patch:
        remove(patch)
        assert any(is_red(seed) for seed in range(4))
