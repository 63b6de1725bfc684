"""Where a run's files are is said by its directory, not by what its journal remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.recovery import moved

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
    entry: dict[str, Any] = {"kind": "trial_requeued", "checkpoint": checkpoint}
    assert moved(entry, Path("/elsewhere/d")) == {**entry, "checkpoint": wanted}


def test_an_entry_without_a_checkpoint_stays() -> None:
    entry = {"kind": "run"}
    assert moved(entry, Path("/elsewhere/d")) is entry
