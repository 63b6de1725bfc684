"""How long a trial of stock Ray Tune and Ray Train takes from its start to its first step: told by the trial itself.

What the documentation of both together recommends: a function trainable that builds a `TorchTrainer`. A trial has a GPU
of its own; its clock begins when the function trainable runs, Tune's own actor being there by then, in its favour.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

NUM_STEPS = 50


def run_stock(directory: Path, model: tuple[dict[str, Any], int], num_trials: int, *, use_gpu: bool) -> dict[str, Any]:
    """So many trials, one at a time: for each the seconds until its first step was done."""
    from ray import tune

    from orchestrator.cluster import RayCluster
    from orchestrator.config.model import ClusterSection

    stamps = directory / "stamps"
    for old in (stamps, directory / "stock"):  # of an earlier try
        shutil.rmtree(old, ignore_errors=True)
    stamps.mkdir(parents=True)
    params, micro_batch = model
    fixed = {
        "params": params,
        "micro_batch": micro_batch,
        "stamps": str(stamps),
        "storage": str(directory / "stock"),
        "use_gpu": use_gpu,
    }
    began_s = time.monotonic()
    with RayCluster(ClusterSection(), "stock", directory, uses_gpus=use_gpu).opened():
        ready_s = time.monotonic()
        tuner = tune.Tuner(
            tune.with_resources(_trial, {"node:__internal_head__": 0.001}),
            param_space={**fixed, "lr": tune.loguniform(1e-4, 3e-3)},
            tune_config=tune.TuneConfig(num_samples=num_trials, max_concurrent_trials=1),
            run_config=tune.RunConfig(name="stock-tune", storage_path=str(directory / "stock"), verbose=0),
        )
        results = tuner.fit()
        ended_s = time.monotonic()
    if results.errors:
        raise RuntimeError(f"a stock trial failed: {results.errors[0]}")
    trials = [
        {"trial": path.stem, "admitted_to_step_s": _read(path.with_suffix(".first_step")) - _read(path)}
        for path in sorted(stamps.glob("*.admitted"))
    ]
    return {"ray_start_s": ready_s - began_s, "fit_s": ended_s - ready_s, "trials": trials}


def _trial(config: dict[str, Any]) -> None:
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trial = tune.get_context().get_trial_id()
    _stamp(config["stamps"], trial, "admitted")
    resources = {"CPU": 1, **({"GPU": 1} if config["use_gpu"] else {})}
    TorchTrainer(
        _train,
        train_loop_config={**config, "trial": trial},
        torch_config=TorchConfig(backend="gloo"),  # one rank: quicker to set up than NCCL
        scaling_config=ScalingConfig(num_workers=1, use_gpu=config["use_gpu"], resources_per_worker=resources),
        run_config=RunConfig(name=f"stock-{trial}", storage_path=config["storage"], callbacks=[TuneReportCallback()]),
    ).fit()


def _train(config: dict[str, Any]) -> None:
    import ray.train
    import torch

    from orchestrator.jobs import build_job

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = build_job("language", {**config["params"], "eval_windows": 64, "lr": config["lr"]})
    job.prepare()
    with device:
        model = job.build_model()
    optimizer = job.build_optimizer(model)
    size = config["micro_batch"]
    for number in range(NUM_STEPS):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            terms = job.loss(model, job.batch(list(range(number * size, (number + 1) * size)), device))
        (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            _stamp(config["stamps"], config["trial"], "first_step")
    ray.train.report({"loss": float(terms.loss_sum) / terms.num_elements})


def _stamp(directory: str, trial: str, event: str) -> None:
    """Note when something happened; all processes are on one node and share its monotonic clock."""
    (Path(directory) / f"{trial}.{event}").write_text(repr(time.monotonic()))


def _read(path: Path) -> float:
    return float(path.read_text())
