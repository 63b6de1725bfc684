"""Searches whose trials have unlike parameters, in whole runs: a list of spaces, and a function of Optuna's trial."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import orchestrator
from orchestrator.view.verify import verify
from tests.integration.runs import call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAINING = """
import orchestrator


def train(config):
    optimizer = config.get("optimizer", {"name": "none"})
    for step in range(2):
        orchestrator.report({"eval/loss": config["lr"] + (optimizer["name"] != "sgd"), "step": step})


def space(trial):
    lr = trial.suggest_float("lr", 0.1, 1.0)
    if trial.suggest_categorical("kind", ["sgd", "adam"]) == "sgd":
        return {"lr": lr, "optimizer": {"name": "sgd", "momentum": trial.suggest_float("momentum", 0.5, 0.9)}}
    return {"lr": lr, "optimizer": {"name": "adam"}}
"""

SCRIPT = """
import json

import orchestrator
from my_training import space, train

run = orchestrator.run(
    train, name="asked", space=space, metric="eval/loss", mode="min", num_trials=4, max_concurrent=2,
    algorithm="optuna", scheduler={"name": "asha"}, policy="static", quiet=True,
)
print(json.dumps({"state": run.state, "params": [t["optimizer"] for t in run.trials.to_dict("records")]}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "my_training.py").write_text(TRAINING)
    return tmp_path


def test_each_trial_draws_from_one_of_several_spaces(project: Path) -> None:
    sgd = {"name": "sgd", "momentum": {"uniform": [0.5, 0.9]}}
    content = {
        "name": "union",
        "storage": str(project / "runs"),
        "policy": {"name": "static"},
        "job": {"name": "my_training:train", "import_paths": [str(project)]},
        "search": {
            "space": [{"lr": {"uniform": [0.1, 1.0]}, "optimizer": {"choice": [sgd]}}, {"lr": {"choice": [7.0]}}],
            "metric": "eval/loss",
            "mode": "min",
            "num_trials": 6,
            "max_concurrent": 2,
        },
    }
    (project / "run.yaml").write_text(yaml.safe_dump(content))
    done = call("run", str(project / "run.yaml"), "--plain")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_dir = project / "runs" / "union"
    assert verify(run_dir)["violations"] == []
    assert "eval/loss  state" in done.stdout
    trials = orchestrator.Run(run_dir).trials
    points = [
        json.loads(line)
        for line in trials[["lr", "optimizer", "eval/loss"]].to_json(orient="records", lines=True).splitlines()
    ]
    assert {point["optimizer"] is None for point in points} == {True, False}, "seed 0 draws from both"
    for point in points:
        if point["optimizer"] is None:
            assert (point["lr"], point["eval/loss"]) == (7.0, 8.0)
        else:
            assert point["optimizer"]["name"] == "sgd"
            assert 0.5 <= point["optimizer"]["momentum"] <= 0.9
            assert point["eval/loss"] == pytest.approx(point["lr"])


def test_a_function_of_optunas_trial_draws_nested_and_conditional_values(project: Path) -> None:
    (project / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=project, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["state"] == "done"
    assert len(answer["params"]) == 4
    for optimizer in answer["params"]:
        assert (optimizer["name"] == "sgd") == ("momentum" in optimizer)
    assert verify(project / "runs" / "asked")["violations"] == []
