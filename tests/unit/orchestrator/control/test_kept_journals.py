"""Journals that earlier versions wrote: they fold to the same state, and their decisions are the same byte for byte.

`kept` is a run of the demo with three trials, `resize` and `search` are scripted and have every other kind of entry.
Beside each journal is the state that the version which wrote it recovered: in full behind the last entry, as a checksum
behind every one. Left out is what that version forgot on the way: fits after an override, and charges of lost slots.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.effects import Applied
from orchestrator.control.engine import relocated
from orchestrator.control.events import RunBegan
from orchestrator.control.journal import FILE_NAME, line_of, read_events, read_history
from orchestrator.control.spec import RunSpec
from orchestrator.control.transition import apply
from orchestrator.control.world import World
from orchestrator.simulate.replay import replay
from tests.unit.orchestrator.control.states import durable_state

JOURNALS = Path(__file__).parent / "journals"
NAMES = ("kept", "resize", "search")


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_read_and_would_be_written_the_same_byte_for_byte(name: str) -> None:
    lines = (JOURNALS / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
    assert [line_of(event) for event in read_events(JOURNALS / f"{name}.jsonl")] == lines


@pytest.mark.parametrize(("name", "num_decisions"), [("kept", 10), ("resize", 6), ("search", 6)])
def test_every_decision_is_taken_again_byte_for_byte(tmp_path: Path, name: str, num_decisions: int) -> None:
    (tmp_path / FILE_NAME).write_bytes((JOURNALS / f"{name}.jsonl").read_bytes())
    assert read_history(tmp_path).damage == ()
    found = replay(tmp_path)
    assert (found.num_same, len(found.decisions)) == (num_decisions, num_decisions)


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_journal_folds_to_the_state_that_its_own_version_recovered(name: str) -> None:
    known = json.loads((JOURNALS / f"{name}.state.json").read_text())
    events = list(read_events(JOURNALS / f"{name}.jsonl"))
    assert isinstance(events[0], RunBegan)
    spec = replace(RunSpec.from_jsonable(dict(events[0].spec)), run_dir=f"/runs/{name}")
    world = World((spec,))
    run, found = world.runs[spec.run_id], []
    for event in events:
        assert isinstance(apply(world, relocated(event, spec)), Applied)
        found.append(zlib.crc32(json.dumps(durable_state(world, run), sort_keys=True).encode()))
    assert json.loads(json.dumps(durable_state(world, run))) == known["last"]
    assert found == known["crc32"]
