"""The orchestrator from Python: what is made of a call, and what a run directory says of its best trial."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray import tune

import orchestrator
from orchestrator import api
from orchestrator.config import load_config
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.jobs import own
from orchestrator.space import as_distribution
from orchestrator.train import best, checkpoint
from orchestrator.train.export import state_dict


def train(lr: float = 0.1) -> float:
    return lr


def content(training: Any, folder: Path, **options: Any) -> dict[str, Any]:
    given = {name: options.pop(name, None) for name in ("name", "params")}
    return api._content(training, folder, given["name"], options.pop("storage", "runs"), given["params"], options)


def test_a_function_with_an_import_path_is_named_by_it(tmp_path: Path) -> None:
    made = content(train, tmp_path, metric="loss", mode="min", space={"lr": [0.1, 0.2]}, num_trials=2)
    assert made["job"]["name"] == f"{__name__}:train"
    assert made["search"] == {"space": {"lr": {"choice": [0.1, 0.2]}}, "metric": "loss", "mode": "min", "num_trials": 2}
    assert made["name"].startswith("train-")


def test_a_function_of_this_process_only_is_shipped_by_value_and_runs_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = 3
    closure: Callable[[float], float] = lambda lr: lr * factor  # noqa: E731
    made = content(closure, tmp_path, name="mine", metric="loss", mode="min", params={"lr": 2.0}, policy="static")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = load_config(tmp_path / "run.yaml").config
    assert config.job.import_paths[0] == str(tmp_path / "runs" / "mine"), "the copy in the run directory comes first"
    assert own.load(config.job.name)(2.0) == 6.0
    file = tmp_path / config.job.name.partition(":")[0]
    assert own.digest_of(file).startswith(file.stem.removeprefix("function-"))
    assert config.policy.name == "static"


def test_ray_tunes_domains_and_lists_are_distributions() -> None:
    assert as_distribution("x", tune.uniform(0, 1)) == {"uniform": [0.0, 1.0]}
    assert as_distribution("x", tune.loguniform(1e-3, 1e-1)) == {"loguniform": [1e-3, 1e-1]}
    assert as_distribution("x", tune.randint(1, 5)) == {"randint": [1, 5]}
    assert as_distribution("x", tune.choice(["a", "b"])) == {"choice": ["a", "b"]}
    assert as_distribution("x", tune.grid_search([1, 2])) == {"grid": [1, 2]}
    assert as_distribution("x", [[8, 8], [16]]) == {"choice": [[8, 8], [16]]}
    assert as_distribution("x", {"uniform": [0, 1]}) == {"uniform": [0, 1]}
    for value in (tune.randn(), tune.quniform(0, 1, 0.1), 3):
        with pytest.raises(ConfigError, match=r"search\.space\.x: got a \w+; allowed: a list of values"):
            as_distribution("x", value)


def test_values_beside_a_run_file_are_settings() -> None:
    settings = api._overrides("second", "/data", {"lr": 0.5}, {"num_trials": 3, "dials": {"batch": {"enabled": False}}})
    assert list(settings) == [
        "search.num_trials=3",
        'dials={"batch": {"enabled": false}}',
        "job.params.lr=0.5",
        'name="second"',
        'storage="/data"',
    ]


def make_run(directory: Path, values: dict[str, list[float]], mode: str = "min") -> orchestrator.Run:
    """A run directory with trials that reported those values, each with a checkpoint."""
    trials = [
        {"trial_id": name, "index": index, "state": "done", "metric_value": reported[-1], "params": {"lr": index}}
        for index, (name, reported) in enumerate(values.items())
    ]
    directory.mkdir(parents=True)
    status = {"schema": 1, "state": "done", "metric": "loss", "mode": mode, "trials": trials}
    (directory / "status.json").write_text(json.dumps(status))
    (directory / "run.yaml").write_text(yaml.safe_dump({"job": {"name": f"{__name__}:train", "params": {"fixed": 1}}}))
    for name, reported in values.items():
        commits = directory / "trials" / name / "checkpoints"
        for step, value in enumerate(reported, start=1):
            state, extra = {"weight": torch.tensor([value])}, {"step": step, "position": step, "kind": "function"}
            path = checkpoint.commit_files(commits, lambda draft, s=state: torch.save(s, draft / "model.pt"), extra)  # type: ignore[misc]
            best.note(commits, best.Best(commit=path.name, step=step, metric="loss", value=value), mode)
    return orchestrator.Run(directory)


@pytest.mark.parametrize(("mode", "trial", "value"), [("min", "b", 0.5), ("max", "a", 4.0)])
def test_the_best_report_of_all_trials_is_kept_and_found(tmp_path: Path, mode: str, trial: str, value: float) -> None:
    run = make_run(tmp_path / "r", {"a": [4.0, 2.0, 3.0, 3.5], "b": [0.5, 0.9, 0.8, 0.7], "c": [1.0]}, mode)
    assert (run.best.trial_id, run.best.value) == (trial, value)
    assert run.best.params == {"fixed": 1, "lr": 0 if trial == "a" else 1}
    assert float(run.best.state_dict()["weight"]) == value
    kept = sorted(path.name for path in (tmp_path / "r" / "trials" / "b" / "checkpoints").iterdir())
    newest = ["step-3", "step-4"]
    assert kept == ["best.json", *sorted({*newest, "step-1" if mode == "min" else "step-2"})]


def test_an_export_holds_what_the_function_wrote_and_loads_in_plain_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", {"a": [4.0], "b": [0.5]})
    line = run.export(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(line, found)
    assert float(found["state"]["weight"]) == 0.5
    facts = json.loads((tmp_path / "out" / "params.json").read_text())
    assert (facts["trial_id"], facts["params"], facts["value"], facts["step"]) == ("b", {"fixed": 1, "lr": 1}, 0.5, 1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    run.export(tmp_path / "other", "a")
    with pytest.raises(ConfigError, match="is there and not empty"):
        run.export(tmp_path / "out")
    with pytest.raises(ConfigError, match="has no trial 'z'; allowed: a, b"):
        run.export(tmp_path / "third", "z")


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    directory.mkdir()
    (directory / "status.json").write_text(json.dumps({"schema": 1, "state": "done", "mode": "min", "trials": []}))
    (directory / "run.yaml").write_text(yaml.safe_dump({"job": {"name": "mlp"}}))
    with pytest.raises(OrchestratorError, match="no trial has a checkpoint"):
        _ = orchestrator.Run(directory).best


def test_a_declared_training_exports_its_weights_once_and_by_name(tmp_path: Path) -> None:
    from orchestrator.jobs import build_job

    job = build_job("language", {"width": 8, "layers": 1, "heads": 2})
    torch.manual_seed(0)
    model = job.build_model()
    optimizer = job.build_optimizer(model)
    commits = tmp_path / "r" / "trials" / "a" / "checkpoints"
    path = checkpoint.commit(
        commits, model=model, optimizer=optimizer, extra={"step": 3}, rank=0, world_size=1, group=None
    )
    best.note(commits, best.Best(commit=path.name, step=3, metric="val_loss", value=1.0), "min")
    params = {"width": 8, "layers": 1, "heads": 2}
    trials = [{"trial_id": "a", "index": 0, "state": "done", "metric_value": 1.0, "params": params}]
    status = {"schema": 1, "state": "done", "metric": "val_loss", "mode": "min", "trials": trials}
    (tmp_path / "r" / "status.json").write_text(json.dumps(status))
    (tmp_path / "r" / "run.yaml").write_text(yaml.safe_dump({"job": {"name": "language"}}))
    run = orchestrator.Run(tmp_path / "r")
    expected = model.state_dict()
    found = state_dict(run.best.source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    line = run.export(tmp_path / "out")
    torch.manual_seed(1)
    fresh = job.build_model()
    exec(line, {"model": fresh})
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
