"""Journals that earlier versions wrote: they fold to the same state, and their decisions are the same byte for byte.

`kept` is a run of the demo with three trials, `resize` and `search` are scripted and have every other kind of entry.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.journal import FILE_NAME, line_of, read_events, read_history
from orchestrator.simulate.replay import replay

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
