"""Wall time of a search of many short trials: ours, Tune with plain functions, and Tune with a TorchTrainer a trial.

The training is `tests/foreign/tabular_24_params.py`, unchanged, of about three seconds on a core; two trials at a time,
one core each, twelve reports a trial. Each arm is a process of its own, from start to end, imports and the start of Ray
included. The TorchTrainer arm may have fewer trials; its time is then its start plus as many times its time per trial,
and the result says so. Ours holds all dials still, so that all arms do the same steps.

    python -m tests.bench.bench_tabular ours          # each arm by itself, then
    python -m tests.bench.bench_tabular report        # the figures of all
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.results_file import ROOT, Figure, Report, chosen_part, options, say

TRAINING = "tests.foreign.tabular_24_params"
FIXED: dict[str, Any] = {"num_rows": 6400, "max_epochs": 12, "early_stopping": None}
SMOOTHING = (0.0, 0.05)
NUM_TRIALS = {"ours": 40, "tune_function": 40, "tune_torch": 10}
AT_A_TIME = 2
LIMIT_S = 900.0
KEPT = ROOT / "build" / "bench" / "tabular"


def ours(folder: Path, num_trials: int) -> dict[str, Any]:
    """`orchestrator.run` of the unchanged function."""
    import orchestrator

    run = orchestrator.run(
        f"{TRAINING}:train",
        name="tabular",
        storage=folder,
        params=FIXED,
        space={"label_smoothing": {"uniform": list(SMOOTHING)}},
        metric="val/loss",
        mode="min",
        num_trials=num_trials,
        max_concurrent=AT_A_TIME,
        policy="static",
        dials={name: {"enabled": False} for name in ("share", "batch", "precision")},
        quiet=True,
    )
    losses = run.trials["val/loss"].tolist()
    return {"losses": losses, "timeline": _timeline(run.path)}


def tune_function(folder: Path, num_trials: int) -> dict[str, Any]:
    """Stock Ray Tune with the function as its trainable."""
    from ray import tune

    from tests.foreign import tabular_24_params

    return _tuned(tune.with_resources(tabular_24_params.train, {"cpu": 1}), folder, num_trials)


def tune_torch(folder: Path, num_trials: int) -> dict[str, Any]:
    """Ray Tune with a function that builds a `TorchTrainer` of one worker, as the documentation of both says."""
    from ray import tune

    outside = {"node:__internal_head__": 0.001}  # its worker is what needs a core
    return _tuned(tune.with_resources(_torch_trial, outside), folder, num_trials, {"folder": str(folder)})


def _torch_trial(config: dict[str, Any]) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = config.pop("folder")
    TorchTrainer(
        _torch_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=f"{folder}/train", callbacks=[TuneReportCallback()]),
    ).fit()


def _torch_loop(config: dict[str, Any]) -> None:
    from ray import train

    training: Any = importlib.import_module(TRAINING)
    training.report = train.report  # Tune's own is not there in a worker of Train
    training.train(config)


def _tuned(trainable: Any, folder: Path, num_trials: int, more: dict[str, Any] | None = None) -> dict[str, Any]:
    import ray
    from ray import tune

    # Unlike ours, they are given nothing by the environment but the repository's path.
    began_s = time.monotonic()
    ray.init(num_cpus=AT_A_TIME, include_dashboard=False, log_to_driver=False)
    ready_s = time.monotonic()
    tuner = tune.Tuner(
        trainable,
        param_space={**FIXED, "label_smoothing": tune.uniform(*SMOOTHING), **(more or {})},
        tune_config=tune.TuneConfig(
            num_samples=num_trials, max_concurrent_trials=AT_A_TIME, metric="val/loss", mode="min"
        ),
        run_config=tune.RunConfig(name="tabular", storage_path=str(folder / "tune"), verbose=0),
    )
    results = tuner.fit()
    fit_s = time.monotonic() - ready_s
    if results.errors:
        raise RuntimeError(f"a trial failed: {results.errors[0]}")
    losses = [float(result.metrics["val/loss"]) for result in results]
    return {"losses": losses, "start_s": ready_s - began_s, "fit_s": fit_s}


ARMS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "ours": ours,
    "tune_function": tune_function,
    "tune_torch": tune_torch,
}


def _timeline(run_dir: Path) -> list[tuple[float, str, str]]:
    """What took ours its time: seconds since the run began, what happened, and to which trial or slot."""
    from orchestrator.control.journal import read

    kinds, found, began_s = {"run", "slot", "trial_assigned", "trial_ended", "run_ended"}, [], 0.0
    for entry in read(run_dir / "journal.jsonl"):
        began_s = began_s or float(entry["wall_s"])
        if entry["kind"] in kinds:
            whose = str(entry.get("trial_id") or entry.get("slot_id") or "")
            words = " ".join(filter(None, (entry["kind"], str(entry.get("state") or ""))))
            found.append((round(float(entry["wall_s"]) - began_s, 3), words, whose))
    return found


def measure(arm: str, num_trials: int) -> dict[str, Any]:
    """Run an arm in a process of its own and keep what it said, with the seconds from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="tabular-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "tests.bench.bench_tabular", "child", arm, str(num_trials), folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        began_s = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        wall_s = time.monotonic() - began_s
        if done.returncode:
            raise RuntimeError(f"{arm} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(answer.read_text())
    if len(found["losses"]) != num_trials:
        raise RuntimeError(f"{arm} has {len(found['losses'])} results of {num_trials} trials")
    found |= {"arm": arm, "num_trials": num_trials, "wall_s": wall_s, "load": list(os.getloadavg())}
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{arm}.json").write_text(json.dumps(found, indent=1) + "\n")
    say(f"  {arm}: {num_trials} trials in {wall_s:.1f} s, mean val/loss {sum(found['losses']) / num_trials:.4f}")
    return found


def scaled(found: dict[str, Any], num_trials: int) -> float:
    """The seconds that so many trials would take: everything but `fit` once, and `fit` in proportion."""
    fit_s = float(found.get("fit_s", 0.0))
    return float(found["wall_s"]) + fit_s * (num_trials / int(found["num_trials"]) - 1)


def report_all(theme: str) -> None:
    """Compare the arms that were measured, and write the results file."""
    report = Report(options=options(theme, repeats=1))
    rows = {arm: json.loads((KEPT / f"{arm}.json").read_text()) for arm in ARMS if (KEPT / f"{arm}.json").exists()}
    report.raw["arms"] = rows
    count = rows["ours"]["num_trials"]
    own_s = scaled(rows["ours"], count)
    for arm, most in (("tune_torch", 0.25), ("tune_function", 0.7)):
        if arm not in rows:
            continue
        num, stock_s = rows[arm]["num_trials"], scaled(rows[arm], count)
        if num != count:
            report.notes.append(
                f"{arm} ran {num} trials in {rows[arm]['wall_s']:.1f} s, scaled to {count}: {stock_s:.1f} s"
            )
        ratio = own_s / stock_s
        report.add(
            Figure(
                name=f"{count} trials, ours against {arm}" + (f" (scaled from {num})" if num != count else ""),
                value=ratio, statistic="one run", unit="x", low=ratio, high=ratio, spread="one run", values=[ratio],
                target=f"<= {most}", is_met=ratio <= most,
            )
        )  # fmt: skip
    report.write()


def main() -> None:
    part = chosen_part([*ARMS, "all", "report", "child"])
    if part == "child":
        arm, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
        (folder / "answer.json").write_text(json.dumps(ARMS[arm](folder, count)))
        return
    num_trials = int(sys.argv.pop(1)) if len(sys.argv) > 1 and sys.argv[1].isdigit() else None
    if part == "all":
        shutil.rmtree(KEPT, ignore_errors=True)
    for arm in ARMS if part == "all" else [part] if part in ARMS else []:
        measure(arm, num_trials or NUM_TRIALS[arm])
    if part in {"all", "report"}:
        report_all("tabular")


if __name__ == "__main__":
    main()
