"""Where a run's files are is said by its directory, not by what its journal remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.events import Recovered, TrialRequeued
from orchestrator.control.recovery import moved
from orchestrator.policies.plan import TrialId

INSIDE = "trials/trial-00002/checkpoints/step-929"


@pytest.mark.parametrize(
    ("checkpoint", "wanted"),
    [
        (f"/runs/c/{INSIDE}", f"/elsewhere/d/{INSIDE}"),
        (f"/trials/c/{INSIDE}", f"/elsewhere/d/{INSIDE}"),
        (f"/elsewhere/d/{INSIDE}", f"/elsewhere/d/{INSIDE}"),
        ("/somewhere/else", "/somewhere/else"),
        (None, None),
    ],
)
def test_a_checkpoint_is_where_the_run_is_now(checkpoint: str | None, wanted: str | None) -> None:
    entry = TrialRequeued(trial_id=TrialId("t"), attempt=1, reason="", checkpoint=checkpoint)
    assert moved(entry, Path("/elsewhere/d")) == replace(entry, checkpoint=wanted)


def test_an_entry_without_a_checkpoint_stays() -> None:
    entry = Recovered(start_id="s", are_workers_gone=True)
    assert moved(entry, Path("/elsewhere/d")) is entry
