"""Users' functions in whole runs: from a script, a run file, and a Tuner; and what a mistake in one looks like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import orchestrator
from orchestrator.control.journal import read
from orchestrator.view.verify import verify
from tests.integration.runs import call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAINING = """
import torch
from ray import tune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(lr, width=16):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    features = torch.randn(2048, 8)
    labels = (features[:, :3].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for epoch in range(4):
        for x, y in DataLoader(TensorDataset(features, labels), batch_size=32, shuffle=True):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            value = nn.functional.cross_entropy(model(features), labels).item()
        print("epoch", epoch, "of", lr)
        torch.save(model.state_dict(), "model.pt")
        tune.report({"val_loss": value, "epoch": epoch}, checkpoint=tune.Checkpoint.from_directory("."))


def boom(lr):
    weights = torch.ones(3)
    return weights + undefined_name
"""

SCRIPT = """
import json
import threading

import orchestrator
from my_training import train

found = {}


def search():
    found["run"] = orchestrator.run(
        train,
        name="mine",
        space={"lr": {"grid": [0.1, 0.01]}, "width": [8, 16]},
        metric="val_loss",
        mode="min",
        num_trials=2,
        max_concurrent=2,
        policy="static",
    )


thread = threading.Thread(target=search)
thread.start()
thread.join()
run = found["run"]
weights = run.best.state_dict()
line = run.export("exported")
print(json.dumps({
    "state": run.state,
    "columns": list(run.trials.columns),
    "losses": run.trials["val_loss"].tolist(),
    "value": run.best.value,
    "params": run.best.params,
    "weights": sorted(weights),
    "line": line,
}))
"""

TUNER = """
import json

from my_training import train
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import orchestrator.tune

with orchestrator.tune.trainable(train, name="tuned", metric="val_loss", mode="min", policy="static") as trainable:
    results = tune.Tuner(
        trainable,
        param_space={"lr": tune.grid_search([0.1, 0.0001])},
        tune_config=tune.TuneConfig(
            metric="val_loss", mode="min", reuse_actors=True, scheduler=ASHAScheduler(grace_period=2, max_t=4)
        ),
        run_config=tune.RunConfig(name="own", storage_path=STORAGE, verbose=0),
    ).fit()
best = results.get_best_result()
print(json.dumps({"lr": best.config["lr"], "val_loss": best.metrics["val_loss"], "epoch": best.metrics["epoch"]}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project: a module with trainings, and a folder that is named like one of ours."""
    (tmp_path / "my_training.py").write_text(TRAINING)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise RuntimeError('nobody of ours imports this')\n")
    return tmp_path


def play(project: Path, script: str) -> dict[str, object]:
    """Run a user's script in the project; what it printed last."""
    (project / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=project, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def test_a_script_searches_with_its_own_function_and_exports_the_best_model(project: Path) -> None:
    answer = play(project, SCRIPT)
    assert answer["state"] == "done"
    assert {"lr", "width", "val_loss"} <= set(answer["columns"])  # type: ignore[call-overload]
    losses = answer["losses"]
    assert isinstance(losses, list)
    assert losses == sorted(losses)
    assert answer["value"] <= losses[0]
    assert answer["params"] == {"lr": 0.1, "width": answer["params"]["width"]}  # type: ignore[index]
    assert answer["weights"] == ["0.bias", "0.weight", "2.bias", "2.weight"]
    found: dict[str, object] = {}
    exec(str(answer["line"]).replace("'exported", f"'{project}/exported"), found)
    assert set(found["state"]) == set(answer["weights"])  # type: ignore[call-overload]
    run_dir = project / "runs" / "mine"
    assert verify(run_dir)["violations"] == []
    log = (run_dir / "trials" / "trial-00000" / "log.txt").read_text()
    assert log.count("epoch 3 of") == 1
    assert (run_dir / "trials" / "trial-00000" / "work" / "model.pt").exists()
    assert not (project / "model.pt").exists()
    run = orchestrator.Run(run_dir)
    assert {trial["state"] for trial in run.trials.to_dict("records")} == {"done"}


def test_a_mistake_in_a_function_is_shown_once_with_its_traceback_and_ends_the_search(project: Path) -> None:
    content = {
        "name": "bad",
        "storage": str(project / "runs"),
        "job": {"name": "my_training:boom", "import_paths": [str(project)]},
        "search": {
            "metric": "val_loss", "mode": "min", "num_trials": 12, "max_concurrent": 2,
            "space": {"lr": {"uniform": [0.1, 0.2]}},
        },
    }  # fmt: skip
    (project / "run.yaml").write_text(yaml.safe_dump(content))
    done = call("run", str(project / "run.yaml"), "--plain")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("return weights + undefined_name") == 1
    assert "every trial failed in the same way" in done.stdout
    assert "ray/tune" not in done.stdout + done.stderr, "frames of Tune and of ours say nothing to a user"
    assert "NameError: name 'undefined_name' is not defined (my_training.py:" in done.stdout
    trials = orchestrator.Run(project / "runs" / "bad").trials
    assert 2 <= len(trials) < 12


def test_a_tuner_of_the_users_own_searches_with_a_function(project: Path) -> None:
    answer = play(project, TUNER.replace("STORAGE", repr(str(project / "results"))))
    assert (answer["lr"], answer["epoch"]) == (0.1, 3)
    run_dir = project / "runs" / "tuned"
    assert verify(run_dir)["violations"] == []
    states = [trial["state"] for trial in orchestrator.Run(run_dir).trials.to_dict("records")]
    assert set(states) <= {"done", "stopped", "paused"}  # what Tune stopped may be taken up again
    (ended,) = [entry for entry in read(run_dir / "journal.jsonl") if entry["kind"] == "run_ended"]
    assert ended["state"] == "done", "a trial that the scheduler stopped last is not cut off"
