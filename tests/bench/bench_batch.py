"""Batches on a CPU: the noise scale against the truth, adaptive against fixed batches, and what measuring costs.

Run with `python -m tests.bench.bench_batch` on an idle machine; each trial runs in a process on a core of its own.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from tests.bench import batch_run
from tests.bench.results_file import ROOT, Figure, Report, median_figure, options, say

PARAMS: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4, "context": 64, "eval_windows": 256, "lr": 1e-3}
START = 16
FIXED = (8, 16, 32, 64, 128)
STAGES = {"early": 120, "middle": 800, "late": 2400}
BOUNDS = {"early": 0.25, "middle": 0.25, "late": 0.40}
POOL = 768
SECONDS = 32.0
EVAL_SAMPLES = 4096


def noise_child() -> dict[str, Any]:
    """Estimates of one trial at three stages, and the covariance of all per-sample gradients there."""
    import torch

    from orchestrator.train.batch.noise import weights_of

    order = batch_run.order_of("language", PARAMS, START, batch_run.limits_of(START, START), 0)
    stepper = batch_run.stepper_of(order, torch.device("cpu"))
    job, model = stepper.job, stepper.model
    draws: list[tuple[int, float, float]] = []
    found = {}
    chosen = torch.randperm(job.num_train_samples, generator=torch.Generator().manual_seed(1))[:POOL].tolist()
    for stage, at in STAGES.items():
        while stepper.step_index < at:
            result = stepper.step()
            if result.noise is not None:
                draws.append((result.step, result.noise.noise_trace, result.noise.grad_sq))
        params = list(model.parameters())
        for param in params:
            param.grad = torch.zeros_like(param)
        weights = weights_of(stepper.optimizer, params)
        assert weights is not None
        rows = []
        for index in chosen:
            model.zero_grad()
            loss = job.loss(model, job.batch([index], torch.device("cpu"))).loss_sum / job.num_elements(1)
            loss.backward()  # type: ignore[no-untyped-call]
            grads = [param.grad for param in params if param.grad is not None]
            rows.append(torch.cat([(g * w).flatten() for g, w in zip(grads, weights, strict=True)]))
        model.zero_grad()
        gradients = torch.stack(rows)
        mean = gradients.mean(0)
        trace = float((gradients - mean).square().sum(1).sum()) / (POOL - 1)
        grad_sq = float(mean.square().sum()) - trace / POOL
        recent = draws[-40:]
        groups = [recent[i : i + 10] for i in range(0, len(recent) - 9, 10)]
        scales = [sum(t for _, t, _ in g) / max(1e-30, sum(s for _, _, s in g)) for g in groups]
        found[stage] = {"truth": trace / grad_sq, "estimates": scales, "trace": trace, "grad_sq": grad_sq}
    return found


def trial_child(batch: int, seed: int) -> dict[str, Any]:
    """One trial, fixed at a batch, or adaptive with batch 0."""
    import torch

    order = batch_run.order_of("language", PARAMS, START, batch_run.limits_of(8, 128), seed)
    if batch:
        order = batch_run.fixed_at(order, batch)
    course = batch_run.train(order, torch.device("cpu"), adapts=batch == 0, seconds=SECONDS, eval_samples=EVAL_SAMPLES)
    return {"curve": course.curve, "decisions": course.decisions, "noise": course.noise}


def overhead_child() -> dict[str, Any]:
    """Seconds per step with and without the noise scale and the memory meter, interleaved."""
    import torch

    from orchestrator.train.batch import meter as meter_module
    from orchestrator.train.batch.memory import MemoryMeter

    params = {**PARAMS, "width": 128}
    order = batch_run.order_of("language", params, 32, batch_run.limits_of(32, 32), 0)
    stepper = batch_run.stepper_of(order, torch.device("cpu"))
    memory = MemoryMeter(torch.device("cpu"))
    for _ in range(20):
        stepper.step()
    # The steady state: as many draws as there are after some minutes.
    stepper._noise.mean = meter_module.NoiseMean(noise_trace=1.0, grad_sq=1.0, count=2 * meter_module.HORIZON)
    real = stepper._noise.begin
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(6):
        for name, seconds in times.items():
            stepper._noise.begin = real if name == "with" else _measures_nothing  # type: ignore[method-assign]
            began_s = time.perf_counter()
            for _ in range(64):
                stepper.step()
                if name == "with":
                    memory.observe(stepper.settings)
            seconds.append(time.perf_counter() - began_s)
    return {"times": times}


def _measures_nothing(step: int, *, is_replayed: bool = False) -> bool:
    return False


def child(core: int, *arguments: str) -> dict[str, Any]:
    """Run one part in a process of its own on one core."""
    command = [sys.executable, "-m", "tests.bench.bench_batch", "--child", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["taskset", "-c", str(core), *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """All parts, side by side as far as there are cores."""
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child", nargs="+")
        name, *rest = parser.parse_args().child
        import torch

        torch.set_num_threads(1)
        parts: dict[str, Any] = {"noise": noise_child, "trial": trial_child, "overhead": overhead_child}
        sys.stdout.write("\n" + json.dumps(parts[name](*(int(value) for value in rest))) + "\n")
        return
    report = Report(options("batch", repeats=2))
    cores = sorted(os.sched_getaffinity(0))[1:] or [0]
    tasks: list[tuple[str, ...]] = [("overhead",), ("noise",)]
    tasks += [("trial", str(batch), str(seed)) for seed in range(report.options.repeats) for batch in (0, *FIXED)]
    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        futures = {task: pool.submit(child, cores[number % len(cores)], *task) for number, task in enumerate(tasks)}
        answers = {" ".join(task): future.result() for task, future in futures.items()}
    report.raw.update(answers)
    _noise(report, answers["noise"])
    _adaptive(report, answers)
    times = answers["overhead"]["times"]
    ratios = [100 * (a / b - 1) for a, b in zip(times["with"], times["without"], strict=True)]
    report.add(
        median_figure(
            "noise scale and memory meter, added to a step",
            ratios,
            "%",
            target="<= 1 %",
            is_met=lambda v, _l, _h: v <= 1,
        )
    )
    report.write()


def _noise(report: Report, found: dict[str, Any]) -> None:
    for stage, numbers in found.items():
        errors = [100 * (value / numbers["truth"] - 1) for value in numbers["estimates"]]
        bound = 100 * BOUNDS[stage]
        say(f"  {stage}: truth {numbers['truth']:.1f}, estimates {[round(v, 1) for v in numbers['estimates']]}")
        report.add(
            median_figure(
                f"noise scale against truth, {stage} (weighed as Adam does)",
                errors,
                "%",
                target=f"within {bound:g} %",
                is_met=partial(_is_within, bound),
            )
        )


def _is_within(bound: float, value: float, _low: float, _high: float) -> bool:
    return abs(value) <= bound


def _adaptive(report: Report, answers: dict[str, Any]) -> None:
    """Time to the loss that the best fixed batch has at nine tenths of its time."""
    best, start, finals = [], [], []
    for seed in range(report.options.repeats):
        courses = {
            batch: batch_run.Course(curve=[tuple(row) for row in answers[f"trial {batch} {seed}"]["curve"]])
            for batch in (0, *FIXED)
        }
        lowest = min(row[2] for batch in FIXED for row in courses[batch].curve if row[0] <= 0.9 * SECONDS)
        times = {batch: course.seconds_to(lowest) for batch, course in courses.items()}
        say(f"  seed {seed}: loss {lowest:.4f} after {times}")
        report.raw[f"times {seed}"] = {str(batch): value for batch, value in times.items()}
        own = times[0] or math.inf
        best.append(min(value for batch, value in times.items() if batch and value is not None) / own)
        start.append((times[START] or SECONDS) / own)
        finals.append(courses[0].curve[-1][2] / min(courses[batch].curve[-1][2] for batch in FIXED) - 1)
    report.add(
        median_figure(
            "time to loss: best of 5 fixed batches over adaptive",
            best,
            "ratio",
            target=">= 0.95",
            is_met=lambda value, _low, _high: value >= 0.95,
        )
    )
    report.add(
        median_figure(
            f"time to loss: start batch {START} over adaptive",
            start,
            "ratio",
            target=">= 0.97",
            is_met=lambda value, _low, _high: value >= 0.97,
        )
    )
    report.add(
        Figure(
            name="final validation loss over that of the best fixed batch, minus one",
            value=statistics.median(finals),
            statistic="median",
            unit="relative",
            low=min(finals),
            high=max(finals),
            spread="min to max",
            values=finals,
        )
    )


if __name__ == "__main__":
    main()
