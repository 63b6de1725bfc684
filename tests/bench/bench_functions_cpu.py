"""Users' functions on cores: what seeing them from outside costs, and what they learn while their dials turn.

    python -m tests.bench.bench_functions_cpu overhead   # a step of about 20 ms, in pairs that alternate in one process
    python -m tests.bench.bench_functions_cpu seeds      # three seeds, dials turning against dials still

`overhead` compares the same loop alone, under the driver, and under the driver with the line `orchestrator.watch`.
`seeds` runs trainings of `tests/foreign`, unchanged, in processes of their own.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.bench.results_file import Figure, Report, chosen_part, median_figure, options, say

STEPS, WARM_STEPS = 15, 3
SEEDS = (0, 1, 2)
TRAININGS = ("ray_train_loop", "tune_function", "resnet_batchnorm")
"""Those of `tests/foreign` whose batch and precision may both turn."""
WATCH_BUDGET = 0.02
"""Part of a trial's time for probes, as run files have it unless they say otherwise."""


def loop(marks: list[float], *, watches: bool) -> None:
    """Some 20 ms a step on one core; appends the seconds of its steps behind the first ones."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import orchestrator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    features, labels = torch.randn(8192, 256), torch.randint(0, 10, (8192,))
    if watches:
        orchestrator.watch(model, optimizer)
    began_s = 0.0
    for step, (x, y) in enumerate(DataLoader(TensorDataset(features, labels), batch_size=96, shuffle=True)):
        if step == WARM_STEPS:
            began_s = time.perf_counter()
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step + 1 == WARM_STEPS + STEPS:
            break
    marks.append((time.perf_counter() - began_s) / STEPS)
    orchestrator.report({"loss": loss.item()})


def driven(function: Callable[[], None], folder: Path) -> None:
    """Call it under the driver of functions."""
    from orchestrator.train.boundary import Boundary
    from orchestrator.train.function.driver import FunctionDriver
    from tests.unit.orchestrator.train.links import ONE_RANK, FakeShare, Script, order

    first = order(folder / "runs" / "r" / "trials" / "t", credit=10**9)
    assert first.trial is not None
    trial = replace(first.trial, metric="loss", max_reports=10**6, probe_budget=WATCH_BUDGET)
    script = Script(replace(first, trial=trial))
    boundary = Boundary(script, 0, 1, None)
    newest = boundary.cross()
    assert newest is not None
    FunctionDriver(newest, function, ONE_RANK, boundary, script, FakeShare()).run()


def overhead(report: Report) -> None:
    """Seconds a step alone over seconds a step under the driver."""
    import torch

    torch.set_num_threads(1)
    for name, watches in (("under the driver", False), ("under the driver, watched", True)):
        alone: list[float] = []
        seen: list[float] = []
        for number in range(report.options.repeats + 1):
            with tempfile.TemporaryDirectory() as folder:
                for is_driven in (False, True) if number % 2 else (True, False):
                    marks: list[float] = []
                    if is_driven:
                        driven(lambda m=marks, w=watches: loop(m, watches=w), Path(folder))  # type: ignore[misc]
                    else:
                        loop(marks, watches=watches)
                    if number:  # the first pair warms up
                        (seen if is_driven else alone).append(marks[0])
        report.raw[name] = {"alone_s": alone, "driven_s": seen}
        say(f"  {name}: {statistics.median(alone) * 1e3:.2f} ms alone, {statistics.median(seen) * 1e3:.2f} ms so")
        report.add(
            median_figure(
                f"speed {name} over that alone",
                [one / other for one, other in zip(alone, seen, strict=True)],
                "x",
                target="median >= 0.98, lower bound >= 0.97",
                is_met=lambda value, low, _high: value >= 0.98 and low >= 0.97,
                bootstrap=True,
            )
        )


def seeds(report: Report) -> None:
    """The last metric of each training, with dials turning and still; the difference against the spread of seeds."""
    from tests.foreign.driven import run_driven
    from tests.foreign.trainings import BY_NAME

    for name in TRAININGS[:1] if report.options.is_quick else TRAININGS:
        training = BY_NAME[name]
        size = int(training.params.get("batch_size", 32))
        turns = {
            "15": {"micro_batch": 2 * size, "grad_accum": 1},
            "25": {"micro_batch": 2 * size, "grad_accum": 1, "tier": "bf16"},
            "40": {"micro_batch": size, "grad_accum": 1, "tier": "bf16"},
            "60": {"micro_batch": size // 2, "grad_accum": 1, "tier": "fp32"},
        }
        ends: dict[str, list[float]] = {"still": [], "turning": []}
        changes = {"batch": 0, "precision": 0}
        for seed in SEEDS[:1] if report.options.is_quick else SEEDS:
            for way, asked in (("still", {}), ("turning", turns)):
                with tempfile.TemporaryDirectory() as folder:
                    found = run_driven(training, Path(folder), params={**training.params, "seed": seed}, turns=asked)
                ends[way].append(float(found.reports[-1]["metrics"][training.metric]))
                if way == "turning":
                    changes["batch"] += _num_changes(found.records["micro_batch"])
                    changes["precision"] += _num_changes(found.records["tier"])
        gap = abs(statistics.mean(ends["turning"]) - statistics.mean(ends["still"]))
        spread = max(ends["still"]) - min(ends["still"])
        report.raw[name] = {**ends, "changes": changes, "metric": training.metric}
        say(f"  {name}: {changes['batch']} changes of the batch and {changes['precision']} of the precision")
        report.add(
            Figure(
                name=f"{name}: {training.metric}, turning against still",
                value=gap,
                statistic="difference of means",
                unit=training.metric,
                low=min(ends["still"]),
                high=max(ends["still"]),
                spread="min to max over seeds, still",
                values=ends["turning"],
                target="<= the spread of seeds",
                is_met=None if report.options.is_quick else gap <= spread,
            )
        )


def _num_changes(values: list[int]) -> int:
    return sum(one != other for one, other in itertools.pairwise(values))


PARTS = {"overhead": overhead, "seeds": seeds}


def main() -> None:
    """Run one part and write its file."""
    part = chosen_part(PARTS)
    report = Report(options(f"functions_{part}", repeats=30, quick_repeats=2))
    PARTS[part](report)
    report.write()


if __name__ == "__main__":
    main()
