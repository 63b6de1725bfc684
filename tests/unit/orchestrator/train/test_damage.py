"""A damaged newest commit costs steps and no trial, whoever reads it: resume, a copied trial, a function, export."""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.orders import Cause, Fallback
from orchestrator.control.resumption import keep_commit
from orchestrator.errors import CheckpointError, DamagedError, NoRoomError
from orchestrator.jobs import build_job
from orchestrator.train import checkpoint, export
from orchestrator.train.causes import cause_of
from orchestrator.train.isolation import seed_generators
from tests.unit.orchestrator.train.links import Script, loop, order


def flip(commit: Path) -> None:
    file = max(
        (path for path in commit.iterdir() if path.name != "manifest.json"), key=lambda path: path.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()  # not the bytes that a hard link of it has as well
    file.write_bytes(bytes(data))


def trained(directory: Path) -> tuple[Script, list[Path]]:
    """A trial that made its two reports; its commits, oldest first."""
    script = Script(order(directory, samples_per_report=80))
    seed_generators(3)
    loop(script, build_job("mlp", {"width": 16, "num_samples": 512})).run()
    script.collect()
    found = sorted((directory / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    return script, found


def resumed(directory: Path, commit: Path, num_reports: int) -> Script:
    first = order(directory, samples_per_report=80)
    assert first.trial is not None
    trial = replace(first.trial, attempt=1, resume_from=str(commit), num_reports_done=num_reports, max_reports=3)
    script = Script(replace(first, trial=trial, credit=3))
    seed_generators(3)
    loop(script, build_job("mlp", {"width": 16, "num_samples": 512})).run()
    script.collect()
    return script


def test_a_trial_goes_on_from_the_commit_before_a_damaged_one_to_the_same_result(tmp_path: Path) -> None:
    _, undisturbed = trained(tmp_path / "whole")
    straight = resumed(tmp_path / "whole", undisturbed[-1], 2)
    _, damaged = trained(tmp_path / "damaged")
    flip(damaged[-1])
    again = resumed(tmp_path / "damaged", damaged[-1], 2)
    assert [report.metrics for report in again.reports] == [report.metrics for report in straight.reports]
    assert straight.fallbacks == []
    assert again.fallbacks == [Fallback(checkpoint=str(damaged[-1]), step=10, num_steps=10)]


def test_a_commit_that_is_kept_for_a_search_has_the_one_before_it_beside_it(tmp_path: Path) -> None:
    """What a copied trial (population based training) begins from; the trial's own commits go on and are removed."""
    _, found = trained(tmp_path / "t")
    kept = keep_commit(found[-1], tmp_path / "t" / "pinned", "0-2")
    assert sorted(path.name for path in kept.parent.iterdir()) == ["step-10", "step-20"]
    flip(kept)
    assert checkpoint.newest_whole(kept)[0] == kept.parent / "step-10"


def test_export_takes_the_newest_whole_commit_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, found = trained(tmp_path / "t")
    params = {"width": 16, "num_samples": 512}
    source = export.Source(trial_id="t", job="mlp", params=params, commit=found[0], metric="val_loss", value=0.5)
    flip(found[0])
    with caplog.at_level(logging.WARNING):
        export.export(source, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "params.json").read_text())
    assert (facts["step"], facts["value"]) == (20, None)
    assert "step-20, it is 10 steps later" in caplog.text
    flip(found[1])
    with pytest.raises(DamagedError):
        export.export(source, tmp_path / "none")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DamagedError("x"), Cause.DAMAGE),
        (NoRoomError("x"), Cause.DISK),
        (OSError(errno.ENOSPC, "no space left on device"), Cause.DISK),
        (OSError(errno.EIO, "input/output error"), Cause.DISK),
        (MemoryError(), Cause.MEMORY),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Cause.DEVICE),
        (CheckpointError("it does not fit"), Cause.OWN),
        (FileNotFoundError(errno.ENOENT, "no such file"), Cause.OWN),
        (ValueError("x"), Cause.OWN),
    ],
)
def test_what_lies_outside_of_a_trial_is_told_from_its_own_mistakes(error: Exception, cause: Cause) -> None:
    assert cause_of(error) is cause
