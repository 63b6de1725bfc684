"""What a live change of each dial costs, and how soon a plan is applied; beside it a change by Ray's own way.

Three worlds in slots of one local Ray: one trial on one rank, one trial on two ranks, and two trials that swap their
shares, so that every grant waits for a release. `TurnInOrder` turns one dial a second. Beside them, what a user of
stock Ray Train does to change a running trial: checkpoint, stop, and `fit()` again with the new settings.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import orchestrator
from tests.bench.language_job import MAX_GRAD_NORM, PARAMS, sized_micro_batch
from tests.bench.orchestrated import CLOSE_TIMEOUT_S, Parts, cluster, scratch, write_run_file
from tests.bench.results_file import Figure, Options, Report, median_figure, options, p95_figure, percentile
from tests.bench.turning_policy import DIALS

STEP_MS = 20.0
REST_S = 0.7
SWITCH_LIMIT_MS = 50.0
NUM_STEPS_ALLOWED, SLACK_MS = 3, 100.0
_NUM_AFTER = 10
"""Steps after a change from which the usual step is taken."""

_WARM_UP_CHANGES = 6
"""Each dial there and back once: the first meeting of a shape or tier is set-up, paid once per process."""


def run_world(directory: Path, name: str, num_trials: int, num_ranks: int, seconds: float) -> dict[str, Any]:
    """Train for so long while the dials turn; every change with its latency, and every changed step with its cost."""
    from orchestrator.supervisor import Supervisor

    low, high = (0.25, 0.5) if num_ranks > 1 else (0.25, 0.75) if num_trials > 1 else (0.5, 1.0)
    micro_batch = sized_micro_batch(STEP_MS) // 2 * 2
    parts = Parts(
        write_run_file(
            directory / f"{name}.yaml",
            name,
            search={"num_trials": num_trials, "max_concurrent": num_trials, "scheduler": {"name": "fifo"}},
            trial={
                "samples_per_report": 10**9,
                "max_reports": 1,
                "num_workers": num_ranks,
                "micro_batch": micro_batch,
            },
            dials={
                "batch": {"min_global": micro_batch * num_ranks, "max_global": micro_batch * num_ranks},
                "precision": {"tiers": ["fp32", "bf16"]},
            },
            policy={
                "name": "tests.bench.turning_policy:TurnInOrder",
                "period_s": 0.1,
                "params": {"rest_s": REST_S, "low_share": low, "high_share": high},
            },
        )
    )
    supervisor = Supervisor(parts.slot_spec, parts.policy)
    try:
        supervisor.open(num_trials)
        parts.wait_for_slots(num_trials)
        for number in range(num_trials):
            parts.ask("submit", f"trial-{number}", {"lr": 1e-3})
            threading.Thread(target=parts.ask, args=("answer", f"trial-{number}", 0), daemon=True).start()
        time.sleep(seconds)
        for number in range(num_trials):
            parts.ask("release", f"trial-{number}")
    finally:
        supervisor.close(CLOSE_TIMEOUT_S)
        parts.end()
    return {"micro_batch": micro_batch, "changes": list(changes(parts, num_ranks))}


def changes(parts: Parts, num_ranks: int) -> list[dict[str, Any]]:
    """Each change of a trial: dial, seconds from commit to the last rank's first step with it, and that step's cost."""
    committed = {entry["generation"]: entry["t_s"] for entry in parts.entries("plan")}
    dials = {(entry["generation"], entry["trial_id"]): entry["dials"] for entry in parts.entries("ack")}
    steps: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in orchestrator.load_run(parts.run_dir).steps.to_pylist():
        steps[row["trial_id"], row["rank"]].append(row)
    found: list[dict[str, Any]] = []
    for (generation, trial_id), turned in dials.items():
        if len(turned) != 1 or generation not in committed:
            continue
        ranks = [_changed_step(steps[trial_id, rank], generation) for rank in range(num_ranks)]
        if any(one is None for one in ranks):
            continue
        applied = [one for one in ranks if one is not None]
        found.append(
            {
                "generation": generation,
                "trial": trial_id,
                "dial": turned[0],
                "latency_s": max(one["applied_s"] for one in applied) - committed[generation],
                "step_s": max(one["before_s"] for one in applied),
                "extra_s": max(one["extra_s"] for one in applied),
                "other_extra_s": max(one["other_extra_s"] for one in applied),
                "switch_s": max(one["switch_s"] for one in applied),
            }
        )
    return sorted(found, key=lambda one: (one["generation"], one["trial"]))[_WARM_UP_CHANGES:]


def _changed_step(rows: list[dict[str, Any]], generation: int) -> dict[str, float] | None:
    """The first step of a rank under a plan, against the steps after it; None at the edges of the trial."""
    index = next((i for i, row in enumerate(rows) if row["generation"] == generation), None)
    if index is None or index < _NUM_AFTER or index + _NUM_AFTER >= len(rows):
        return None
    after = [_work_s(row) for row in rows[index + 1 : index + 1 + _NUM_AFTER]]
    before = [row["step_s"] for row in rows[index - _NUM_AFTER : index]]
    row = rows[index]
    return {
        "applied_s": row["start_s"] + row["switch_s"],
        "before_s": statistics.median(before),
        "extra_s": _work_s(row) - statistics.median(after),
        "other_extra_s": _work_s(rows[index - 1])
        - statistics.median(_work_s(one) for one in rows[index - 8 : index - 1]),
        "switch_s": row["switch_s"],
    }


def _work_s(row: dict[str, Any]) -> float:
    """A step without the sleep that enforces a share below a core: that is the share itself, not its change."""
    return float(row["step_s"] - row["wait_s"])


# Ray's own way.


def stock_loop(config: dict[str, Any]) -> None:
    """A training loop of stock Ray Train: goes on from the last checkpoint, stops after its number of steps."""
    import numpy as np
    import ray.train
    import torch

    from orchestrator.jobs import build_job

    torch.set_num_threads(1)
    job = build_job("language", {**PARAMS, "eval_windows": 64})
    job.prepare()
    model = job.build_model()
    optimizer = job.build_optimizer(model)
    checkpoint, device = ray.train.get_checkpoint(), torch.device("cpu")
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            state = torch.load(f"{directory}/state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    order = np.random.default_rng(0).permutation(job.num_train_samples)
    ended_s: list[float] = []
    for number in range(config["steps"]):
        indices = order[number * config["micro_batch"] : (number + 1) * config["micro_batch"]]
        terms = job.loss(model, job.batch(indices, device))
        (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended_s.append(time.monotonic())
    with tempfile.TemporaryDirectory() as directory:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{directory}/state.pt")
        ray.train.report({"step": config["steps"]}, checkpoint=ray.train.Checkpoint.from_directory(directory))
    Path(config["out"]).write_text(json.dumps([ended_s[0], ended_s[-1]]))


def run_stock(directory: Path, micro_batch: int, num_changes: int) -> list[float]:
    """Seconds from the last step before a change to the end of the first one after it."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    times = []
    for number in range(num_changes + 1):
        out = directory / f"stock-{number}.json"
        halved = number % 2
        TorchTrainer(
            stock_loop,
            train_loop_config={"steps": 20, "micro_batch": micro_batch // (1 + halved), "out": str(out)},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="stock", storage_path=str(directory / "ray")),
        ).fit()
        times.append(json.loads(out.read_text()))
    return [after[0] - before[1] for before, after in itertools.pairwise(times)]


# Together.


def latency_figure(name: str, found: list[dict[str, Any]]) -> Figure:
    """Plan committed to applied by all ranks, beyond the steps that it may take."""
    excess_ms = [1e3 * (one["latency_s"] - NUM_STEPS_ALLOWED * one["step_s"]) for one in found]
    return p95_figure(
        f"{name}: committed -> applied, beyond {NUM_STEPS_ALLOWED} steps", excess_ms, "ms", limit=SLACK_MS
    )


def add_world(report: Report, name: str, found: list[dict[str, Any]]) -> None:
    """All figures of one world."""
    report.add(latency_figure(name, found))
    report.add(p95_figure("  committed -> applied", [1e3 * one["latency_s"] for one in found], "ms"))
    report.add(median_figure("  usual step", [1e3 * one["step_s"] for one in found], "ms"))
    for dial in DIALS:
        mine = [one for one in found if one["dial"] == dial]
        extra_ms = [1e3 * one["extra_s"] for one in mine]
        report.add(p95_figure(f"{name}: {dial}, extra time in its step", extra_ms, "ms", limit=SWITCH_LIMIT_MS))
        other_ms = [1e3 * one["other_extra_s"] for one in mine]
        report.add(p95_figure("  the same of the step before, where nothing changes", other_ms, "ms"))
        report.add(median_figure("  of it in the change itself", [1e3 * one["switch_s"] for one in mine], "ms"))


def main() -> None:
    """Measure the three worlds, then the stock way, in one Ray cluster."""
    settings: Options = options("dials", repeats=60, quick_repeats=8)
    report = Report(settings)
    seconds = (settings.repeats * len(DIALS) / 3 + _WARM_UP_CHANGES) * REST_S * 1.3
    worlds = {"1 trial, 1 rank": (1, 1), "1 trial, 2 ranks": (1, 2), "2 trials that swap": (2, 1)}
    with scratch() as directory, cluster(num_cpus=2):
        for name, (num_trials, num_ranks) in worlds.items():
            world = run_world(directory, f"w{num_trials}{num_ranks}", num_trials, num_ranks, seconds)
            report.raw[name] = world
            add_world(report, name, world["changes"])
        gaps_s = run_stock(directory, world["micro_batch"], 1 if settings.is_quick else 3)
    report.raw["stock restart, s"] = gaps_s
    report.add(median_figure("the same by Ray Train: stop, fit() again", gaps_s, "s"))
    extra_s = [one["extra_s"] for name in worlds for one in report.raw[name]["changes"]]
    ratio = statistics.median(gaps_s) / max(percentile(extra_s, 95), 1e-4)
    report.add(median_figure("Ray's restart over a live change (p95)", [ratio], "x"))
    report.write()


if __name__ == "__main__":
    main()
