"""Declared trainings of users in whole runs: a class in a project with its own folder `jobs`, and library models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import orchestrator
from orchestrator.view.verify import verify
from tests.integration.runs import call, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]

DIGITS = """
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)


class Directions:
    metric, mode = "accuracy", "max"

    def __init__(self, lr: float, width: int = 32) -> None:
        self.lr, self.width = lr, width
        points = torch.randn(1200, 2, generator=torch.Generator().manual_seed(0))
        labels = ((torch.atan2(points[:, 0], points[:, 1]) / torch.pi + 1) * 5).long().clamp(max=9)
        self.train, self.held_out = TensorDataset(points[:1000], labels[:1000]), (points[1000:], labels[1000:])

    def build_model(self):
        return nn.Sequential(nn.Linear(2, self.width), nn.BatchNorm1d(self.width), nn.ReLU(), nn.Linear(self.width, 10))

    def train_data(self):
        return DataLoader(self.train, batch_size=20, shuffle=True)

    def loss(self, model, batch):
        points, labels = batch
        return functional.cross_entropy(model(points), labels)

    def build_optimizer(self, model, num_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=num_steps)

    def evaluate(self, model):
        points, labels = self.held_out
        return {"accuracy": float((model(points).argmax(1) == labels).float().mean())}
"""

SCRIPT = """
import json

import orchestrator
from jobs.directions import Directions

run = orchestrator.run(
    Directions, name="mine", space={"lr": [0.05, 0.1]}, num_trials=2, max_concurrent=2, quiet=True,
    trial={"epochs_per_report": 2, "max_reports": 2, "micro_batch": 20},
)
weights = run.best.state_dict()
print(json.dumps({"state": run.state, "best": run.best.value, "weights": len(weights), "line": run.export("out")}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project whose trainings are in a package that is named like one of ours."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    (tmp_path / "jobs" / "directions.py").write_text(DIGITS)
    return tmp_path


def test_a_class_in_a_projects_own_jobs_folder_trains_in_epochs_and_is_exported(project: Path) -> None:
    (project / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=project, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["state"] == "done"
    assert answer["best"] > 0.4, "ten classes, so a guess is right in a tenth"
    assert answer["weights"] == 9, "two linear layers, and BatchNorm with its statistics"
    run_dir = project / "runs" / "mine"
    assert verify(run_dir)["violations"] == []
    found = results(run_dir)
    assert sorted(index for _, index in found) == [0, 0, 1, 1]
    for (_, index), (_, num_samples, _) in found.items():
        assert 2000 * (index + 1) <= num_samples < 2000 * (index + 1) + 128, "two epochs of 1000 samples, and a step"
    begun = yaml.safe_load((run_dir / "run.yaml").read_text())["trial"]
    assert (begun["samples_per_report"], begun["epochs_per_report"]) == (2000, None)


def library_run(folder: Path, **changes: Any) -> Path:
    """A run of two trials of a model of `tests/unit/jobs/library_models.py`, through the command."""
    content = {"name": "r", "storage": str(folder), "policy": {"name": "static"}, **changes}
    content["job"]["import_paths"] = [str(ROOT)]
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    done = call("run", str(folder / "run.yaml"), "--plain")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "samples per epoch; a report every" in done.stdout
    assert verify(folder / "r")["violations"] == []
    return folder / "r"


def test_a_lightning_module_is_searched_by_the_command(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'ray-orchestrator[lightning]'")
    models = "tests.unit.jobs.library_models"
    run_dir = library_run(
        tmp_path,
        job={"name": f"{models}:Classifier", "data": f"{models}:Points", "args": {"max_epochs": 2}},
        search={"space": {"lr": {"grid": [0.01, 0.05]}}, "num_trials": 2, "max_concurrent": 2, "metric": "val_loss"},
    )
    found = results(run_dir)
    assert {metrics for *_, kept in found.values() for metrics in kept} == {"val_loss", "accuracy", "largest"}
    assert {samples for _, samples, _ in found.values()} == {256, 512}
    assert "net.0.weight" in orchestrator.Run(run_dir).best.state_dict()


def test_a_hugging_face_model_is_searched_by_the_command_and_written_in_its_layout(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[huggingface]'")
    models = "tests.unit.jobs.library_models"
    args = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"}
    run_dir = library_run(
        tmp_path,
        job={"name": f"{models}:gpt2", "data": f"{models}:sums", "args": args},
        search={"space": {"learning_rate": {"grid": [0.001, 0.01]}}, "num_trials": 2, "max_concurrent": 2},
    )
    found = results(run_dir)
    assert {samples for _, samples, _ in found.values()} == {192, 384}
    assert all({"eval_loss", "eval_accuracy"} == set(metrics) for *_, metrics in found.values())
    run = orchestrator.Run(run_dir)
    assert run.best.params["learning_rate"] == 0.01
    assert run.export(tmp_path / "out").startswith("from transformers import GPT2LMHeadModel")
    assert (tmp_path / "out" / "config.json").exists()
