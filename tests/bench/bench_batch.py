"""Batches on a CPU: the noise scale against the truth, what measuring it costs, adaptive against fixed batches.

Run with `python -m tests.bench.bench_batch PART`. `noise` counts steps and needs no idle machine. `speed` does: it
leaves the seconds per step at every batch. `adaptive` trains by the clock of that file: a window of steps takes what a
measured one of that batch took, so that its result does not depend on what else runs meanwhile; trials that are done
are kept under build/bench, and a part that was broken off goes on behind them.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench import batch_run
from tests.bench.results_file import (
    RESULTS,
    ROOT,
    Figure,
    Report,
    chosen_part,
    default_path,
    median_figure,
    options,
    say,
)

PARAMS: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4, "context": 64, "eval_windows": 256, "lr": 1e-3}
START = 16
FIXED = (8, 16, 32, 64, 128)
STAGES = {"early": 120, "middle": 800, "late": 2400}
BOUNDS = {"early": 0.25, "middle": 0.25, "late": 0.40}
POOL = 768
SECONDS = 20.0
EVAL_SAMPLES = 2048
CPU = torch.device("cpu")


def noise(report: Report) -> None:
    """Estimates of one trial at three stages, and the covariance of all per-sample gradients there."""
    errors: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for seed in range(report.options.repeats):
        found = _noise_of(seed)
        report.raw[f"seed {seed}"] = found
        for stage, numbers in found.items():
            truth, estimates = numbers["truth"], numbers["estimates"]
            say(f"  seed {seed}, {stage}: truth {truth:.1f}, estimates {[round(value, 1) for value in estimates]}")
            errors[stage] += [100 * (value / truth - 1) for value in estimates]
    for stage, percents in errors.items():
        bound = 100 * BOUNDS[stage]
        report.add(
            median_figure(
                f"noise scale against truth, {stage} (weighed as Adam does)",
                percents,
                "%",
                target=f"within {bound:g} %",
                is_met=partial(_is_within, bound),
            )
        )


def _is_within(bound: float, value: float, _low: float, _high: float) -> bool:
    return abs(value) <= bound


def _noise_of(seed: int) -> dict[str, Any]:
    from orchestrator.train.batch.meter import NoiseMean
    from orchestrator.train.batch.noise import weights_of

    order = batch_run.order_of("language", PARAMS, START, batch_run.limits_of(START, START), seed)
    stepper = batch_run.stepper_of(order, CPU)
    job, model = stepper.job, stepper.model
    draws: list[tuple[int, float, float]] = []
    found = {}
    chosen = torch.randperm(job.num_train_samples, generator=torch.Generator().manual_seed(1))[:POOL].tolist()
    for stage, at in STAGES.items():
        while stepper.step_index < at:
            stepper.noise.mean = NoiseMean()  # measured as often as in the beginning
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
            loss = job.loss(model, job.batch([index], CPU)).loss_sum / job.num_elements(1)
            loss.backward()  # type: ignore[no-untyped-call]
            grads = [param.grad for param in params if param.grad is not None]
            rows.append(torch.cat([(g * w).flatten() for g, w in zip(grads, weights, strict=True)]))
        model.zero_grad()
        gradients = torch.stack(rows)
        mean = gradients.mean(0)
        trace = float((gradients - mean).square().sum(1).sum()) / (POOL - 1)
        grad_sq = float(mean.square().sum()) - trace / POOL
        # What was true long before is no estimate of now.
        recent = [draw for draw in draws if draw[0] >= at - min(100, at // 3)]
        groups = [recent[i : i + 10] for i in range(0, len(recent) - 9, 10)]
        scales = [sum(t for _, t, _ in g) / max(1e-30, sum(s for _, _, s in g)) for g in groups]
        found[stage] = {"truth": trace / grad_sq, "estimates": scales, "trace": trace, "grad_sq": grad_sq}
    return found


def speed(report: Report) -> None:
    """What the noise scale and the memory meter add to a step, and the seconds per step at every batch."""
    _overhead(report)
    windows: dict[str, list[float]] = {str(batch): [] for batch in FIXED}
    steppers = {
        batch: batch_run.stepper_of(
            batch_run.order_of("language", PARAMS, batch, batch_run.limits_of(batch, batch), 0), CPU
        )
        for batch in FIXED
    }
    for stepper in steppers.values():
        for _ in range(10):
            stepper.step()
    for _ in range(2 if report.options.is_quick else 20):
        for batch, stepper in steppers.items():
            windows[str(batch)].append(_window_of(stepper))
    report.raw["windows, s per step"] = windows
    report.raw["decision, s"] = statistics.median(batch_run.decision_times())
    for batch, seconds in windows.items():
        report.add(median_figure(f"step of {batch} samples", [1e3 * value for value in seconds], "ms"))


def _window_of(stepper: Any) -> float:
    """Mean seconds per step over half a second; the steps that are measured for the noise scale are among them."""
    began_s, num_steps = time.perf_counter(), 0
    while time.perf_counter() - began_s < batch_run.WINDOW_S:
        stepper.step()
        num_steps += 1
    return (time.perf_counter() - began_s) / num_steps


def _overhead(report: Report) -> None:
    """Seconds of 64 steps with and without them, in turn."""
    from orchestrator.train.batch import meter as meter_module
    from orchestrator.train.batch.memory import MemoryMeter

    params = {**PARAMS, "width": 128}
    order = batch_run.order_of("language", params, 32, batch_run.limits_of(32, 32), 0)
    stepper = batch_run.stepper_of(order, CPU)
    memory = MemoryMeter(CPU)
    for _ in range(20):
        stepper.step()
    # The steady state: as many draws as there are after some minutes.
    stepper.noise.mean = meter_module.NoiseMean(noise_trace=1.0, grad_sq=1.0, count=2 * meter_module.HORIZON)
    real = stepper.noise.begin
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(2 if report.options.is_quick else 6 * report.options.repeats):
        for name, seconds in times.items():
            stepper.noise.begin = real if name == "with" else _measures_nothing  # type: ignore[method-assign]
            began_s = time.perf_counter()
            for _ in range(64):
                stepper.step()
                if name == "with":
                    memory.observe(stepper.settings)
            seconds.append(time.perf_counter() - began_s)
    report.raw["64 steps, s"] = times
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


def _measures_nothing(step: int, *, is_replayed: bool = False) -> bool:
    return False


def adaptive(report: Report) -> None:
    """Time to the loss that the best fixed batch has at nine tenths of its time; adaptive, and each of them fixed."""
    source = _speeds_file()
    measured = json.loads(source.read_text())["raw"]
    clock = batch_run.MeasuredClock(
        windows={int(batch): seconds for batch, seconds in measured["windows, s per step"].items()},
        decision_s=measured["decision, s"],
    )
    report.raw["clock"] = source.name
    report.notes.append(f"seconds are those of the clock in {source.name}")
    best, start, finals, fixed_finals = [], [], [], []
    for seed in range(report.options.repeats):
        courses = {batch: _course(report, batch, seed, clock) for batch in (0, *FIXED)}
        lowest = min(row[2] for batch in FIXED for row in courses[batch].curve if row[0] <= 0.9 * SECONDS)
        times = {batch: course.seconds_to(lowest) for batch, course in courses.items()}
        say(f"  seed {seed}: loss {lowest:.4f} after {times}")
        report.raw[f"times {seed}"] = {str(batch): value for batch, value in times.items()}
        own = times[0] or math.inf
        best.append(min(value for batch, value in times.items() if batch and value is not None) / own)
        start.append((times[START] or SECONDS) / own)
        fixed_finals.append({batch: courses[batch].curve[-1][2] for batch in FIXED})
        finals.append(courses[0].curve[-1][2])
    report.add(_at_least("time to loss: best of 5 fixed batches over adaptive", best, 0.95))
    report.add(_at_least(f"time to loss: start batch {START} over adaptive", start, 0.97))
    report.add(_final(finals, fixed_finals))


def _at_least(name: str, values: list[float], bound: float) -> Figure:
    return median_figure(
        name, values, "ratio", target=f">= {bound:g}", is_met=lambda value, _low, _high: value >= bound
    )


def _final(ours: list[float], fixed: list[dict[int, float]]) -> Figure:
    """The loss at the end against that of the batch that is best over all seeds, each with its own seed."""
    best = min(FIXED, key=lambda batch: statistics.fmean(row[batch] for row in fixed))
    theirs = [row[best] for row in fixed]
    differences = [100 * (own / other - 1) for own, other in zip(ours, theirs, strict=True)]
    middle = statistics.median(theirs)
    spread = 100 * (max(theirs) - min(theirs)) / middle
    return median_figure(
        f"final validation loss over that of batch {best}, the best fixed one, same seed",
        differences,
        "%",
        target=f"<= {spread:.2f} %, the range of that batch over seeds",
        is_met=lambda value, _low, _high: value <= spread,
    )


def _course(report: Report, batch: int, seed: int, clock: batch_run.MeasuredClock) -> batch_run.Course:
    """One trial, fixed at a batch, or adaptive with batch 0; taken from its file where it is done already."""
    kept = ROOT / "build" / "bench" / "batch_adaptive" / f"{batch}-{seed}.json"
    if not kept.exists() or report.options.is_quick:
        order = batch_run.order_of("language", PARAMS, START, batch_run.limits_of(min(FIXED), max(FIXED)), seed)
        order = batch_run.fixed_at(order, batch) if batch else order
        seconds = SECONDS / 16 if report.options.is_quick else SECONDS
        course = batch_run.train(
            order, CPU, adapts=batch == 0, seconds=seconds, eval_samples=EVAL_SAMPLES, clock=clock.of(seed)
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = {"curve": course.curve, "decisions": course.decisions, "noise": course.noise}
        kept.write_text(json.dumps(found))
    found = json.loads(kept.read_text())
    report.raw[f"trial {batch} {seed}"] = found
    return batch_run.Course(curve=[tuple(row) for row in found["curve"]])


def _speeds_file() -> Path:
    """The newest file of the part `speed` that was taken on this machine."""
    pattern = default_path("batch_speed", is_quick=False).name.rsplit("_", 1)[0]
    found = sorted(RESULTS.glob(f"{pattern}_*.json"))
    if not found:
        sys.exit(f"there is no {pattern}_*.json in {RESULTS}: run `python -m tests.bench.bench_batch speed` first")
    return found[-1]


PARTS: dict[str, tuple[Callable[[Report], None], int]] = {
    "noise": (noise, 5),
    "speed": (speed, 3),
    "adaptive": (adaptive, 3),
}


def main() -> None:
    """Run the part that the command line names."""
    part = chosen_part(PARTS)
    measure, repeats = PARTS[part]
    torch.set_num_threads(1)
    report = Report(options(f"batch_{part}", repeats=repeats))
    measure(report)
    report.write()


if __name__ == "__main__":
    main()
