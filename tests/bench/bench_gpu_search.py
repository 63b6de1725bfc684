"""A search of twelve 7 M language models on GPUs: ours against stock Ray Tune and Ray Train, one arm a process.

Same space, seeds, data, samples per trial and scheduler. Stock is written as a competent user would: bf16 autocast,
fused AdamW, pinned batches; its trials take a whole GPU, a quarter or an eighth, as many at a time as that makes on
--cards.
Seconds of stock are those of `fit()`; ours are those of the whole command, start of Ray and slots included, and beside
them (search_s) those from when Ray is there, before the first slot opens, to the last trial's end, as `fit()` counts;
where they went is in `timeline`. The expert's arms are stock's with a loop that replays one CUDA graph per step.
Appends one line of JSON per arm to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from tests.bench.gpu_job import MAX_GRAD_NORM, SIZES
from tests.bench.hand_trials import TINY
from tests.bench.results_file import ROOT, commit, machine, say
from tests.bench.run_timeline import whole

NUM_REPORTS, SEED, MICRO_BATCH = 4, 1, 16
LEARNING_RATES = (1e-4, 3e-3)
ARMS = {
    "ours_all": "batch and tier turn",
    "ours_batch": "the batch turns, in bf16",
    "ours_tier": "the tier turns, at one batch",
    "ours_fixed": "one batch, in bf16",
    "ours_graph": "as ours_all, nothing compiled",
    "ours_eager": "as ours_fixed, kernel by kernel",
    "ours_alone": "as ours_all, one trial at a time",
    "stock_1": "a trial a card",
    "stock_1/4": "four trials a card",
    "stock_1/8": "eight trials a card",
    "expert_1": "as stock_1, the loop one CUDA graph",
    "expert_1/4": "as stock_1/4, the loop one CUDA graph",
}

STEP_MODES = {"ours_graph": "graph", "ours_eager": "eager"}


def run_file(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """Ours: the run file of an arm."""
    turns_batch, turns_tier = (
        arm in {"ours_all", "ours_graph", "ours_batch", "ours_alone"},
        arm in {"ours_all", "ours_graph", "ours_tier", "ours_alone"},
    )
    dearest = "fp32" if given.rehearse else "tf32"
    return {
        "name": arm,
        "storage": str(given.directory),
        "seed": SEED,
        "job": {"name": "language", "params": {**size_of(given), "eval_windows": 256}},
        "search": {
            "space": {"lr": {"loguniform": list(LEARNING_RATES)}},
            "num_trials": given.trials,
            "max_concurrent": given.cards * (1 if arm == "ours_alone" else given.concurrent),
            "scheduler": {"name": "asha", "grace_reports": 1, "reduction_factor": 2},
        },
        "trial": {
            "samples_per_report": given.steps * MICRO_BATCH,
            "max_reports": NUM_REPORTS,
            "micro_batch": MICRO_BATCH,
        },
        "dials": {
            "share": {"enabled": False},
            "batch": {"enabled": turns_batch, "min_global": 16, "max_global": 256, "max_micro": 256},
            "precision": {"enabled": turns_tier, "tiers": [dearest, "bf16"] if turns_tier else ["bf16"]},
        },
        "policy": {"name": "goodput" if turns_batch or turns_tier else "static"},
        "devices": {"use": "cpu" if given.rehearse else "gpu", "step_mode": STEP_MODES.get(arm, "auto")},
    }


def run_ours(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """One search with `orchestrator run`."""
    import orchestrator
    from orchestrator.control.journal import read

    path = given.directory / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(run_file(arm, given)))
    began_s = time.monotonic()
    command = [sys.executable, "-m", "orchestrator", "run", str(path), "--plain"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=given.timeout, check=False)
    seconds = time.monotonic() - began_s
    entries = list(read(given.directory / arm / "journal.jsonl"))
    results = [entry for entry in entries if entry["kind"] == "result"]
    ends = [entry["t_s"] for entry in entries if entry["kind"] == "trial_ended"]
    begun = [entry["t_s"] for entry in entries if entry["kind"] == "run"]
    run = orchestrator.load_run(given.directory / arm)
    steps = run.to_pandas("steps")
    return {
        "seconds": seconds,
        "search_s": max(ends, default=0.0) - min(begun, default=0.0),
        "exit_code": done.returncode,
        "tail": done.stdout[-600:] + done.stderr[-600:],
        "num_reports": len(results),
        "best": min((entry["metrics"]["val_loss"] for entry in results), default=None),
        "learning_rates": [entry["params"]["lr"] for entry in entries if entry["kind"] == "trial_queued"],
        "num_samples": sum(entry["num_samples"] for entry in entries if entry["kind"] == "trial_ended"),
        "graph_ratio": float((steps["flags"] // 4 % 2).mean()) if "flags" in steps else None,
        "compiled_s": compiled_s(given.directory),
        "median_step_ms": 1e3 * float(steps["step_s"].median()),
        "max_memory_bytes": int(steps["memory_bytes"].max()),
        "timeline": whole(given.directory / arm),
    }


def compiled_s(storage: Path) -> list[dict[str, float]]:
    """Seconds of the first and of the newest further compilation of each kind of step, as slots noted them.

    Without TORCHINDUCTOR_CACHE_DIR every arm begins with nothing compiled.
    """
    directory = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", storage / ".compiled"))
    return [json.loads(note.read_text()) for note in sorted(directory.glob("compiled-*/*.json"))]


def size_of(given: argparse.Namespace) -> dict[str, Any]:
    """Parameters of the job: of the size, or tiny on cores."""
    return TINY if given.rehearse else SIZES[given.size][0]


def train_by_hand(config: dict[str, Any]) -> None:
    """The training loop of a stock trial."""
    import numpy as np
    import torch

    from orchestrator.jobs import build_job

    torch.manual_seed(SEED)
    job = build_job("language", {**config["params"], "eval_windows": 256, "lr": config["lr"]})
    job.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = job.build_model()
    optimizer = job.build_optimizer(model)
    order, count = np.random.default_rng(SEED).permutation(job.num_train_samples), 0
    in_steps_s, first_step_wall_s = 0.0, time.time()
    for report in range(NUM_REPORTS):
        began_s = time.perf_counter()
        for _ in range(config["steps"]):
            indices = np.take(order, range(count, count + MICRO_BATCH), mode="wrap")
            count += MICRO_BATCH
            batch = job.batch(indices, torch.device("cpu"))
            if device.type == "cuda":
                batch = tuple(part.pin_memory().to(device, non_blocking=True) for part in batch)
            with torch.autocast(device.type, torch.bfloat16):
                terms = job.loss(model, batch)
            (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()  # once a report: the steps are then done, not only launched
        in_steps_s += time.perf_counter() - began_s
        times = {"in_steps_s": in_steps_s, "first_step_wall_s": first_step_wall_s}
        _report(config, report, model, optimizer, {**job.evaluate(model, device), **times})


def train_by_expert(config: dict[str, Any]) -> None:
    """The same with the best loop there is: the whole step one CUDA graph."""
    from tests.bench.gpu_job import BestLoop

    loop = BestLoop(config["size"], "bf16", seed=SEED, eval_windows=256, lr=config["lr"])
    in_steps_s, first_step_wall_s = 0.0, time.time()
    for report in range(NUM_REPORTS):
        in_steps_s += loop.run(config["steps"]) * config["steps"]
        times = {"in_steps_s": in_steps_s, "first_step_wall_s": first_step_wall_s}
        _report(config, report, loop.model, loop.optimizer, {**loop.evaluate(), **times})


def _report(config: dict[str, Any], report: int, model: Any, optimizer: Any, metrics: dict[str, float]) -> None:
    from tests.bench.bench_search import _report_by_hand

    _report_by_hand(model, optimizer, {**metrics, "steps": (report + 1) * config["steps"]}, report)


def stock_trial(config: dict[str, Any]) -> None:
    """The function trainable: it builds the trainer of its trial and waits for it."""
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    gpus = {"GPU": config["gpus"]} if config["gpus"] else {}
    resources = {"CPU": 1 if gpus else 0.25, **gpus}
    TorchTrainer(
        train_by_expert if config["is_expert"] else train_by_hand,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name=f"stock-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def run_stock(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """One search with Ray Tune and Ray Train, which Tune ends at --timeout."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from orchestrator.cluster import RayCluster
    from orchestrator.config.model import ClusterSection
    from tests.bench.stock_ends import Ends

    ends = Ends(given.out, arm, given.trials)
    part = float(Fraction(arm.split("_")[1]))
    max_concurrent = round(given.cards / part)
    fixed = {"params": size_of(given), "steps": given.steps, "storage": str(given.directory)}
    # Nothing is captured on cores: there the arms of the expert are those of stock.
    fixed |= {"size": given.size, "is_expert": arm.startswith("expert") and not given.rehearse}
    fixed["gpus"] = 0.0 if given.rehearse else part
    with RayCluster(ClusterSection(), "stock", given.directory).opened():
        generator = BasicVariantGenerator(random_state=SEED, max_concurrent=max_concurrent)  # as ours has
        tuner = tune.Tuner(
            tune.with_resources(stock_trial, {"node:__internal_head__": 0.001}),
            param_space={**fixed, "lr": tune.loguniform(*LEARNING_RATES)},
            tune_config=tune.TuneConfig(
                num_samples=given.trials,
                search_alg=generator,
                time_budget_s=given.timeout,
                scheduler=ASHAScheduler(
                    metric="val_loss", mode="min", max_t=NUM_REPORTS, grace_period=1, reduction_factor=2
                ),
            ),
            run_config=tune.RunConfig(
                name=arm.replace("/", "-"), storage_path=str(given.directory), verbose=0, callbacks=[ends]
            ),
        )
        ends.begin()
        began_s = time.monotonic()
        results = tuner.fit()
        seconds = time.monotonic() - began_s
    metrics = [result.metrics for result in results if result.metrics]
    configs = [result.config for result in results if result.config]
    return {
        "seconds": seconds,
        "is_cut": seconds >= given.timeout,
        "num_ended": len(ends.ended),
        "ended_s": [round(each["ended_s"], 2) for each in ends.ended],
        "num_errors": len(results.errors),
        "num_reports": sum(int(each.get("report", -1)) + 1 for each in metrics),
        "learning_rates": [config["lr"] for config in configs],
        "num_steps": ends.num_steps,
        "in_steps_s": ends.in_steps_s,
        "in_steps_ratio": ends.in_steps_s / (seconds * max_concurrent),
        "best": min((each["val_loss"] for each in metrics if "val_loss" in each), default=None),
    }


def main() -> None:
    """Run one arm."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", choices=list(ARMS), required=True)
    parser.add_argument("--size", choices=list(SIZES), default="7M")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--concurrent", type=int, default=4, help="trials of ours at a time on each card, at most")
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true", help="on cores, with a tiny model")
    parser.add_argument("--steps", type=int, default=500, help="steps between two reports at the start batch")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which an arm is ended")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/bench-search"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    found = run_ours(given.arm, given) if given.arm.startswith("ours") else run_stock(given.arm, given)
    row = {
        "arm": given.arm,
        "size": given.size,
        "trials": given.trials,
        "steps": given.steps,
        "concurrent": given.concurrent,
        "cards": given.cards,
        **found,
        "command": sys.orig_argv,
        "commit": commit(),
        "machine": machine(),
    }
    with given.out.open("a") as out:
        out.write(json.dumps(row, default=float) + "\n")
    say(json.dumps({key: row[key] for key in ("arm", "seconds", "num_reports", "best")}))


if __name__ == "__main__":
    main()
