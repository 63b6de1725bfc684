"""Dials of functions in whole runs: the batch turns, a tier breaks no code, and a watched model keeps its state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.control.journal import read
from tests.foreign.trainings import BY_NAME, ROOT
from tests.integration.runs import call, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAINING = """
import time

import torch
from ray import tune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import orchestrator


def layers(width, depth):
    hidden = [each for _ in range(depth) for each in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), *hidden, nn.Linear(width, 2))


def until_turned(lr, limit_s=90.0):
    \"\"\"Labels are noisy, and a step takes about as long with twice the samples; until the batch has changed.\"\"\"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    features = torch.randn(60000, 16)
    labels = (features[:, :8].sum(1) + 6 * torch.randn(60000) > 0).long()
    model = layers(128, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loader, sizes = DataLoader(TensorDataset(features, labels), batch_size=16, shuffle=True), []
    began_s = time.monotonic()
    while not (sizes and sizes[-1] != 16) and time.monotonic() - began_s < limit_s:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sizes.append(len(x))
            if len(sizes) > 50 and len(set(sizes[-50:])) == 1 and sizes[-1] != 16:
                break
    tune.report({"val_loss": loss.item(), "size": sizes[-1]})


def with_numpy(lr):
    \"\"\"NumPy has no bf16, so that this code raises in it.\"\"\"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = layers(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for epoch in range(3):
        for step in range(300):
            output = model(torch.randn(16, 16))
            loss = output.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(0.005)
            output.detach().numpy().mean()
        tune.report({"val_loss": loss.item()})


def watched(lr):
    \"\"\"Its loop asks where to begin; it reports no files of its own.\"\"\"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    features = torch.randn(256, 16)
    labels = (features[:, :4].sum(1) > 0).long()
    model = layers(16, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    orchestrator.watch(model, optimizer)
    loader = DataLoader(TensorDataset(features, labels), batch_size=16, shuffle=True)
    for epoch in range(orchestrator.num_reports(), 6):
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(0.05)
        tune.report({"val_loss": loss.item()})
"""
ALL_ON = {"share": {"enabled": False}, "batch": {"max_global": 256, "max_micro": 256}, "precision": {"enabled": False}}


def function_file(directory: Path, name: str, rate: float, **changes: Any) -> Path:
    (directory / "dialled.py").write_text(TRAINING)
    search = {"metric": "val_loss", "mode": "min", "space": {"lr": {"choice": [rate]}}, "num_trials": 1}
    return run_file(
        directory / "run.yaml",
        job={"name": f"dialled:{name}", "import_paths": [str(directory)]},
        search={**search, "max_concurrent": 1, "scheduler": {"name": "fifo"}},
        trial={},
        **changes,
    )


def trial_of(run_dir: Path) -> dict[str, Any]:
    (trial,) = json.loads((run_dir / "status.json").read_text())["trials"]
    return dict(trial)


@pytest.mark.parametrize("policy", ["goodput", "goodput_joint"])
def test_the_batch_of_a_function_turns_by_what_was_measured_of_it(tmp_path: Path, policy: str) -> None:
    path = function_file(
        tmp_path, "until_turned", 0.005, policy={"name": policy, "params": {"cooldown_s": 1.0}}, dials=ALL_ON
    )
    ran = call("run", str(path), "--plain")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run_dir = tmp_path / "runs" / "r"
    status = json.loads((run_dir / "status.json").read_text())
    assert status["dials"]["batch"]["changes_applied"] >= 1
    ((_, _, metrics),) = results(run_dir).values()
    assert metrics["size"] != 16
    steps = orchestrator.load_run(run_dir).to_pandas("steps")
    assert {16, int(metrics["size"])} <= set(steps["num_samples"])
    assert steps["noise_trace"].notna().sum() >= 10
    rows = [
        row
        for entry in read(run_dir / "journal.jsonl")
        if entry["kind"] == "plan"
        for row in entry["plan"]["allocations"]
    ]
    assert any(row["reason"].startswith("batch 16 -> ") for row in rows)
    assert json.loads(call("verify", str(run_dir), "--json").stdout)["violations"] == []


def test_code_that_cannot_do_with_a_cheaper_tier_trains_in_its_own(tmp_path: Path) -> None:
    dials = {**ALL_ON, "batch": {"enabled": False}, "precision": {"tiers": ["fp32", "bf16"]}}
    path = function_file(tmp_path, "with_numpy", 0.01, policy={"name": "tests.tier_policy:Cheapest"}, dials=dials)
    run = start("run", str(path), "--plain", run_dir=tmp_path / "runs" / "r")
    code, output = run.end()
    assert code == 0, output
    (requeued,) = run.of("trial_requeued")
    reason = "it raised in bf16: TypeError: Got unsupported ScalarType BFloat16 (dialled.py:"
    assert requeued["precision_off"].startswith(reason)
    assert requeued["num_restarts"] == requeued["num_overflows"] == 0
    trial = trial_of(run.run_dir)
    assert trial["state"] == "done"
    assert trial["off"]["precision"].startswith(reason)
    assert [entry["off"].get("precision", "") for entry in run.of("dials")][-1].startswith(reason)
    assert len(results(run.run_dir)) == 3
    assert reason in (run.run_dir / "trials" / "trial-00000" / "log.txt").read_text()
    assert json.loads(call("verify", str(run.run_dir), "--json").stdout)["violations"] == []


def test_a_watched_model_goes_on_with_its_state_when_the_run_was_killed(tmp_path: Path) -> None:
    """Losses are those of the same function in one go, by itself."""
    path = function_file(tmp_path, "watched", 0.003)
    run = start("run", str(path), "--plain", run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: len(results(run.run_dir)) >= 2 if run.entries else False, "two reports")
    run.kill()
    resumed = call("resume", str(run.run_dir), "--plain")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    values = [metrics["val_loss"] for _, (_, _, metrics) in sorted(results(run.run_dir).items())]
    found: dict[str, Any] = {"__name__": "dialled"}
    exec(TRAINING.replace("from ray import tune", "").replace("time.sleep(0.05)", "pass"), found)
    reported: list[float] = []
    found["tune"] = type("Tune", (), {"report": staticmethod(lambda metrics: reported.append(metrics["val_loss"]))})
    torch.manual_seed(1)
    found["watched"](0.003)
    assert values == pytest.approx(reported, rel=1e-5)
    steps = orchestrator.load_run(run.run_dir).to_pandas("steps")
    second = steps[steps["attempt"] == steps["attempt"].max()]
    assert int(second["step"].min()) % 16 == 0
    assert int(second["step"].min()) > 0, "it did not begin anew"
    exported = call("export", str(run.run_dir), "--output", str(tmp_path / "best"))
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert (tmp_path / "best" / "model.safetensors").exists()
    assert json.loads(call("verify", str(run.run_dir), "--json").stdout)["violations"] == []


def test_a_ray_train_loop_on_two_ranks_turns_its_dials_on_both_before_the_same_step(tmp_path: Path) -> None:
    training = BY_NAME["ray_train_loop"]
    params = {**training.params, "epochs": 30}
    seed = params.pop("seed")
    path = run_file(
        tmp_path / "run.yaml",
        job={"name": training.import_path, "params": params, "import_paths": [str(ROOT)]},
        search={
            "metric": training.metric,
            "mode": training.mode,
            "space": {"seed": {"choice": [seed]}},
            "num_trials": 1,
            "max_concurrent": 1,
            "scheduler": {"name": "fifo"},
        },
        trial={"num_workers": 2},
        dials={"share": {"min": 0.1}, "batch": {"enabled": True}, "precision": {"tiers": ["fp32", "bf16"]}},
        policy={"name": "tests.tier_policy:Cheapest", "params": {"share": 0.3}},
    )
    ran = call("run", str(path), "--plain")
    run_dir = tmp_path / "runs" / "r"
    assert ran.returncode == 0, ran.stdout + ran.stderr
    trial = trial_of(run_dir)
    assert (trial["state"], trial["num_workers"]) == ("done", 2)
    assert trial["off"] == {"batch": "several ranks"}
    found = results(run_dir)
    assert len(found) == 30
    accuracies = [metrics["accuracy"] for _, (_, _, metrics) in sorted(found.items())]
    assert accuracies[-1] > accuracies[0]
    steps = orchestrator.load_run(run_dir).to_pandas("steps").sort_values("step")
    first, second = (steps[steps["rank"] == rank] for rank in (0, 1))
    assert len(first) == len(second) == 30 * 2048 // (2 * 64)
    assert set(first["num_samples"]) == {2 * 64}
    for name in ("generation", "tier", "share", "num_samples"):
        assert list(first[name]) == list(second[name]), f"ranks differ in {name}"
    assert len(set(first["tier"])) == len(set(first["share"])) == 2, "both turned"
    assert json.loads(call("verify", str(run_dir), "--json").stdout)["violations"] == []
