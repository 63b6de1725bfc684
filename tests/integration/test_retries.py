"""A trial that failed for a reason outside of it goes on with `resume`, from its newest whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.control.journal import read
from orchestrator.view.verify import verify
from tests.integration.runs import call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAINING = """
from pathlib import Path

import torch
from ray import tune

BROKEN = Path(__file__).with_name("broken")


def train(lr):
    begun = tune.get_checkpoint()
    first = 0
    if begun is not None:
        with begun.as_directory() as folder:
            first = int(Path(folder, "epoch.txt").read_text()) + 1
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=lr)
    for epoch in range(first, 4):
        for _ in range(5):
            optimizer.zero_grad()
            (weight * weight).sum().backward()
            optimizer.step()
        if epoch == 2 and lr > 0.05 and BROKEN.exists():
            raise MemoryError("no memory on this machine")
        Path("state").mkdir(exist_ok=True)
        Path("state", "epoch.txt").write_text(str(epoch))
        tune.report({"val_loss": float(epoch), "first": first}, checkpoint=tune.Checkpoint.from_directory("state"))
"""


def test_a_trial_that_ran_out_of_memory_goes_on_behind_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "moody.py").write_text(TRAINING)
    (tmp_path / "broken").touch()
    run_dir = tmp_path / "runs" / "r"
    content: dict[str, Any] = {
        "name": "r",
        "storage": str(tmp_path / "runs"),
        "job": {"name": "moody:train", "import_paths": [str(tmp_path)]},
        "search": {"metric": "val_loss", "mode": "min", "space": {"lr": {"grid": [0.01, 0.1]}}, "num_trials": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    content["search"]["max_concurrent"] = 1
    first = call("run", str(tmp_path / "run.yaml"), "--plain")
    assert first.returncode == 4, first.stderr
    failed = json.loads((run_dir / "status.json").read_text())["trials"][1]
    assert (failed["state"], failed["cause"]) == ("failed", "memory")
    newest = run_dir / "trials" / failed["trial_id"] / "checkpoints" / "step-10"
    (newest / "epoch.txt").write_text("7")
    (tmp_path / "broken").unlink()
    second = call("resume", str(run_dir), "--plain")
    assert second.returncode == 0, second.stdout + second.stderr
    entries = list(read(run_dir / "journal.jsonl"))
    damaged = [entry for entry in entries if entry["kind"] == "commit_damaged"]
    assert [(entry["step"], entry["num_steps"]) for entry in damaged] == [(5, 5)]
    reports = [entry for entry in entries if entry["kind"] == "result" and entry["trial_id"] == failed["trial_id"]]
    assert [entry["index"] for entry in reports] == [0, 1, 2, 3]
    assert [entry["metrics"]["first"] for entry in reports] == [0.0, 0.0, 1.0, 1.0], "behind the report of epoch 0"
    assert verify(run_dir)["violations"] == []
    assert "nothing to resume" in call("resume", str(run_dir)).stderr
