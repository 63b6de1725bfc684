"""A search in slots against the same search with stock Ray Tune and Ray Train: time to the first step, and in all.

Six trials of three seconds under ASHA, two at a time, one core each; the same job, samples, evaluation and checkpoints
on both sides, in the same Ray cluster, one search after the other. Three searches per repeat: stock, ours with the
slots opened at the same moment as the search (cold), and ours with the slots open before it (warm).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orchestrator
from tests.bench.language_job import MAX_GRAD_NORM, PARAMS, sized_micro_batch
from tests.bench.orchestrated import CLOSE_TIMEOUT_S, Parts, cluster, scratch, write_run_file
from tests.bench.results_file import Options, Report, median_figure, options, say

STEP_MS = 20.0
NUM_TRIALS, NUM_SLOTS, NUM_REPORTS = 6, 2, 3
SEED = 1
FIRST_STEP_TARGET, WARM_TARGET, COLD_TARGET, REFILL_TARGET = 0.02, 0.2, 0.6, 0.4
_LEARNING_RATES = (1e-3, 1e-2)


def num_report_steps(settings: Options) -> int:
    """Steps between two reports; a trial of three reports is three seconds long."""
    return 10 if settings.is_quick else 50


# Ours.


def run_ours(directory: Path, name: str, micro_batch: int, settings: Options, *, is_warm: bool) -> dict[str, Any]:
    """One search in slots: its seconds, and for every trial those until its first step was done."""
    from orchestrator.supervisor import Supervisor
    from orchestrator.tune.search import Search

    parts = Parts(write_run_file(directory / f"{name}.yaml", name, **_run_file(micro_batch, settings)))
    supervisor = Supervisor(parts.slot_spec, parts.policy)
    began_s = time.monotonic()
    try:
        supervisor.open(NUM_SLOTS)
        if is_warm:
            parts.wait_for_slots(NUM_SLOTS)
            began_s = time.monotonic()
        search = Search(parts.config, parts.spec.metric, parts.spec.mode, str(parts.run_dir))
        search.start(parts.policy, parts.actor_name, parts.namespace)
        while not search.join(0.05):
            if supervisor.gave_up is not None:
                raise RuntimeError(f"slots cannot be opened: {supervisor.gave_up}")
        seconds = time.monotonic() - began_s
        if search.error is not None:
            raise RuntimeError(f"the search failed: {search.error}")
    finally:
        supervisor.close(CLOSE_TIMEOUT_S)
        parts.end()
    return {
        "seconds": seconds,
        "trials": list(_our_trials(parts)),
        "refills_s": _our_refills(parts),
        "num_reports": len(parts.entries("result")),
    }


def _our_refills(parts: Parts) -> list[float]:
    """Seconds from the word of the scheduler (or the last report of a trial) to the next trial's first step."""
    steps = orchestrator.load_run(parts.run_dir).steps.to_pylist()
    first = {row["trial_id"]: row["start_s"] + row["step_s"] for row in steps if row["seq"] == 0 and row["rank"] == 0}
    stops = {entry["trial_id"]: entry["t_s"] for entry in parts.entries("trial_stop")}
    ends = {entry["trial_id"]: entry["t_s"] for entry in parts.entries("trial_ended")}
    begun = [entry["trial_id"] for entry in parts.entries("trial_assigned")]
    return refills([min(ends[trial], stops.get(trial, ends[trial])) for trial in ends], [first[one] for one in begun])


def refills(freed_s: list[float], first_steps_s: list[float]) -> list[float]:
    """The n-th room that becomes free goes to the n-th trial after those that began at once."""
    freed, later = sorted(freed_s), sorted(first_steps_s)[NUM_SLOTS:]
    return [step - free for free, step in zip(freed, later, strict=False)]


def _run_file(micro_batch: int, settings: Options) -> dict[str, Any]:
    return {
        "seed": SEED,
        "search": {
            "space": {"lr": {"loguniform": list(_LEARNING_RATES)}},
            "num_trials": NUM_TRIALS,
            "max_concurrent": NUM_SLOTS,
            "scheduler": {"name": "asha", "grace_reports": 1, "reduction_factor": 2},
        },
        "trial": {
            "samples_per_report": num_report_steps(settings) * micro_batch,
            "max_reports": NUM_REPORTS,
            "micro_batch": micro_batch,
            "share": 0.5,
        },
    }


def _our_trials(parts: Parts) -> Iterator[dict[str, Any]]:
    """For each trial seconds from its arrival, and from its slot, to the end of its first optimizer step."""
    steps = orchestrator.load_run(parts.run_dir).steps.to_pylist()
    first = {row["trial_id"]: row["start_s"] + row["step_s"] for row in steps if row["seq"] == 0 and row["rank"] == 0}
    assigned = {entry["trial_id"]: entry["t_s"] for entry in parts.entries("trial_assigned")}
    for entry in parts.entries("trial_queued"):
        trial_id = entry["trial_id"]
        yield {
            "trial": trial_id,
            "admitted_to_step_s": first[trial_id] - entry["t_s"],
            "assigned_to_step_s": first[trial_id] - assigned[trial_id],
        }


# Stock: what the documentation of Ray Tune and Ray Train together recommends.


def train_by_hand(config: dict[str, Any]) -> None:
    """The training loop of a stock trial: one Ray Train worker."""
    import numpy as np
    import torch

    from orchestrator.jobs import build_job

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    job = build_job("language", {**PARAMS, "eval_windows": 64, "lr": config["lr"]})
    job.prepare()
    model = job.build_model()
    optimizer = job.build_optimizer(model)
    order, device, count = np.random.default_rng(SEED).permutation(job.num_train_samples), torch.device("cpu"), 0
    for report in range(NUM_REPORTS):
        for _ in range(config["steps"]):
            indices = order[count : count + config["micro_batch"]]
            count += len(indices)
            terms = job.loss(model, job.batch(indices, device))
            (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if count == len(indices):
                _stamp(config["stamps"], config["trial"], "first_step")
        _report_by_hand(model, optimizer, job.evaluate(model, device), report)


def _report_by_hand(model: Any, optimizer: Any, metrics: dict[str, float], report: int) -> None:
    """Write a checkpoint and report it."""
    import tempfile

    import ray.train
    import torch

    with tempfile.TemporaryDirectory() as directory:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{directory}/state.pt")
        ray.train.report({**metrics, "report": report}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def stock_trial(config: dict[str, Any]) -> None:
    """The function trainable: it builds the trainer of its trial and waits for it."""
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trial = tune.get_context().get_trial_id()
    _stamp(config["stamps"], trial, "admitted")
    TorchTrainer(
        train_by_hand,
        train_loop_config={**config, "trial": trial},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=f"stock-{trial}", storage_path=config["storage"], callbacks=[TuneReportCallback()]),
    ).fit()


def run_stock(directory: Path, name: str, micro_batch: int, settings: Options) -> dict[str, Any]:
    """One stock search: its seconds, and for every trial those until its first step was done."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    stamps = directory / f"{name}-stamps"
    stamps.mkdir()
    fixed = {
        "steps": num_report_steps(settings),
        "micro_batch": micro_batch,
        "stamps": str(stamps),
        "storage": str(directory / name),
    }
    tuner = tune.Tuner(
        # The trainable only waits; the worker of its trainer reserves the core.
        tune.with_resources(stock_trial, {"node:__internal_head__": 0.001}),
        param_space={**fixed, "lr": tune.loguniform(*_LEARNING_RATES)},
        tune_config=tune.TuneConfig(
            num_samples=NUM_TRIALS,
            max_concurrent_trials=NUM_SLOTS,
            scheduler=ASHAScheduler(
                metric="val_loss", mode="min", max_t=NUM_REPORTS, grace_period=1, reduction_factor=2
            ),
        ),
        run_config=tune.RunConfig(
            name=f"{name}-tune", storage_path=str(directory), verbose=0, callbacks=[_freed_stamper(str(stamps))]
        ),
    )
    began_s = time.monotonic()
    results = tuner.fit()
    freed = [float(path.read_text()) for path in stamps.glob("*.freed")]
    first_steps = [float(path.read_text()) for path in stamps.glob("*.first_step")]
    seconds = time.monotonic() - began_s
    if results.errors:
        raise RuntimeError(f"a stock trial failed: {results.errors[0]}")
    num_reports = sum(int(result.metrics.get("report", -1)) + 1 for result in results if result.metrics)
    return {
        "seconds": seconds,
        "trials": list(_stock_trials(stamps)),
        "refills_s": refills(freed, first_steps),
        "num_reports": num_reports,
    }


def _freed_stamper(stamps: str) -> Any:
    """A Tune callback that notes when a trial ended, by itself or by the scheduler."""
    from ray import tune

    class Freed(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _stamp(stamps, trial.trial_id, "freed")

    return Freed()


def _stamp(directory: str, trial: str, event: str) -> None:
    """Note when something happened; all processes are on one node and share its monotonic clock."""
    (Path(directory) / f"{trial}.{event}").write_text(repr(time.monotonic()))


def _stock_trials(stamps: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(stamps.glob("*.admitted")):
        admitted_s = float(path.read_text())
        first_s = float(path.with_suffix(".first_step").read_text())
        yield {"trial": path.stem, "admitted_to_step_s": first_s - admitted_s}


# Together.


def add_figures(report: Report, searches: list[dict[str, dict[str, Any]]]) -> None:
    """The three figures, each as a ratio to the stock search of the same repeat."""

    def latencies(kind: str, key: str) -> list[list[float]]:
        return [[trial[key] for trial in search[kind]["trials"]] for search in searches]

    warm, stock = latencies("warm", "admitted_to_step_s"), latencies("stock", "admitted_to_step_s")
    ratios = [statistics.median(ours) / statistics.median(theirs) for ours, theirs in zip(warm, stock, strict=True)]
    report.add(_ratio("admitted -> first step, warm slot / stock", ratios, FIRST_STEP_TARGET))
    for kind, target in (("warm", WARM_TARGET), ("cold", COLD_TARGET)):
        ratios = [search[kind]["seconds"] / search["stock"]["seconds"] for search in searches]
        report.add(_ratio(f"6-trial search, {kind} / stock", ratios, target))
    ratios = [
        statistics.median(search["warm"]["refills_s"]) / statistics.median(search["stock"]["refills_s"])
        for search in searches
    ]
    report.add(_ratio("room freed -> next first step, warm slot / stock", ratios, REFILL_TARGET))
    for kind in ("warm", "stock"):
        values = [value for search in searches for value in search[kind]["refills_s"]]
        report.add(median_figure(f"  room freed -> next first step, {kind}", values, "s"))
    for kind, found in (("warm slot", warm), ("stock", stock)):
        report.add(median_figure(f"  admitted -> first step, {kind}", [v for one in found for v in one], "s"))
    assigned = [value for one in latencies("warm", "assigned_to_step_s") for value in one]
    report.add(median_figure("  slot given -> first step, warm slot", assigned, "s"))
    for kind in ("stock", "cold", "warm"):
        report.add(median_figure(f"  6-trial search, {kind}", [search[kind]["seconds"] for search in searches], "s"))
        reports = [search[kind]["num_reports"] for search in searches]
        report.add(median_figure(f"  reports of all trials, {kind}", reports, "reports"))


def _ratio(name: str, ratios: list[float], target: float) -> Any:
    return median_figure(name, ratios, "x", target=f"<= {target}", is_met=lambda value, _low, _high: value <= target)


def main() -> None:
    """Run the three searches in turn, so many times."""
    settings = options("search", repeats=2)
    report = Report(settings)
    micro_batch = sized_micro_batch(STEP_MS)
    searches = []
    with scratch() as directory, cluster(num_cpus=2):
        for number in range(settings.repeats):
            search = {
                "stock": run_stock(directory, f"stock{number}", micro_batch, settings),
                "cold": run_ours(directory, f"cold{number}", micro_batch, settings, is_warm=False),
                "warm": run_ours(directory, f"warm{number}", micro_batch, settings, is_warm=True),
            }
            say(f"  repeat {number}: " + json.dumps({kind: round(one["seconds"], 1) for kind, one in search.items()}))
            searches.append(search)
    report.raw |= {"job": PARAMS, "micro_batch": micro_batch, "searches": searches}
    report.notes.append("stock runs with the health checks of the orchestrator (0.5 s instead of 2 s), in its favour")
    report.notes.append("seconds exclude ray.init; ASHA stops asynchronously, so numbers of reports differ a little")
    add_figures(report, searches)
    report.write()


if __name__ == "__main__":
    main()
