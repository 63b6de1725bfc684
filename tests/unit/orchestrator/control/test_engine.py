"""Where a run's files are is said by its directory, not by what its journal remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.engine import relocated
from orchestrator.control.events import Recovered, ResumptionWanted, TrialRequeued
from orchestrator.control.orders import Resumption
from orchestrator.policies.plan import TrialId
from tests.unit.orchestrator.control.worlds import spec_of

SPEC = spec_of(Path("/elsewhere/d"))
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
    assert relocated(entry, SPEC) == replace(entry, checkpoint=wanted, run_id="r")


def test_a_checkpoint_that_the_search_will_ask_for_is_there_too() -> None:
    wish = Resumption(token="t", origin=TrialId("a"), num_reports=1, checkpoint=f"/runs/c/{INSIDE}")
    entry = ResumptionWanted(trial_id=TrialId("t"), params={}, resumption=wish)
    found = relocated(entry, SPEC)
    assert isinstance(found, ResumptionWanted)
    assert found.resumption == replace(wish, checkpoint=f"/elsewhere/d/{INSIDE}")


def test_an_entry_without_a_checkpoint_stays() -> None:
    entry = Recovered(start_id="s", are_workers_gone=True)
    assert relocated(entry, SPEC) == replace(entry, run_id="r")
