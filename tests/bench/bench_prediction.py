"""How well a live run's throughput is predicted: the fit of its first minutes against every later window.

`python -m tests.bench.bench_prediction [RUN_DIR] ...`: of a run that is there, or of one made for it, a search on the
CPU in which every dial turns. What was known is the fit in the last decision of the journal before each of `AFTER_S`
seconds have passed since the first step, trials of one shape together. From then on each second of equal settings of
rank 0's telemetry is predicted from it and held against what it measured. The target is for the last of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import orchestrator
from orchestrator.control.events import PlanCommitted
from orchestrator.control.journal import read_history
from orchestrator.policies import NOTHING_FITTED, Observation, TrialFit, pool, predict_step_s, snapshot_from
from orchestrator.policies.tier import Tier
from tests.bench.results_file import ROOT, Report, median_figure, options, say

AFTER_S = (120.0, 240.0, 300.0)
RUN_S = 390.0
WINDOW_S = 1.0
MIN_STEPS = 3
TARGET = 0.1
KEYS = ("generation", "cores", "micro_batch", "grad_accum", "num_workers", "tier")
QUICK = ((40.0,), 75.0)


def make_run(directory: Path, run_s: float) -> Path:
    """The demo's search with trials that last, interrupted after so many seconds."""
    command = [sys.executable, "-m", "orchestrator", "run", str(ROOT / "demo.yaml"), "--quiet"]
    changes = {"name": "long", "storage": directory, "trial.samples_per_report": 16_384, "search.num_trials": 12}
    for key, value in changes.items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process.wait(timeout=run_s)
    except subprocess.TimeoutExpired:
        process.send_signal(2)  # as Ctrl-C: trials commit and leave
        process.wait(timeout=60)
    return directory / "long"


def known_by(run_dir: Path, until_s: float) -> dict[str, TrialFit]:
    """The fits of each shape as they stand in the last decision before a time on the run's clock."""
    plans = [entry for entry in read_history(run_dir).of(PlanCommitted) if entry.t_s <= until_s]
    if not plans:
        raise SystemExit(f"{run_dir} took no decision in its first seconds: nothing was known")
    shapes: dict[str, list[TrialFit]] = defaultdict(list)
    for view in snapshot_from(plans[-1].snapshot).trials:
        shapes[view.shape].append(view.fit)
    return {shape: pool(group) for shape, group in shapes.items()}


def shapes_of(run_dir: Path) -> dict[str, str]:
    """The shape of every trial that was ever decided about."""
    snapshots = [snapshot_from(entry.snapshot) for entry in read_history(run_dir).of(PlanCommitted)]
    return {view.trial_id: view.shape for snapshot in snapshots for view in snapshot.trials}


def windows(steps: Any) -> list[tuple[str, float, Observation]]:
    """(trial, begin, observation) of the steps of rank 0, cut where settings change and every so many seconds."""
    found = []
    for trial_id, mine in steps[steps["rank"] == 0].groupby("trial_id", observed=True):
        marks = mine[list(KEYS)].astype(str)
        runs = (marks != marks.shift()).any(axis=1).cumsum()
        for _, run in mine.groupby(runs):
            whole = run.iloc[1:]  # the first step after a change also pays for it
            for _, rows in whole.groupby((whole["start_s"] // WINDOW_S).astype(int)):
                first = rows.iloc[0]
                seen = Observation(
                    cores=round(float(first["cores"]), 4),
                    tier=Tier(str(first["tier"])),
                    micro_batch=int(first["micro_batch"]),
                    grad_accum=int(first["grad_accum"]),
                    num_workers=int(first["num_workers"]),
                    num_steps=len(rows),
                    step_s=float(rows["step_s"].median()),
                )
                found.append((str(trial_id), float(first["start_s"]), seen))
    return found


def errors(run_dir: Path, after_s: float) -> list[dict[str, Any]]:
    """Every later window: what was predicted and what was measured."""
    steps = orchestrator.load_run(run_dir).to_pandas("steps")
    begin_s = float(steps["start_s"].min())
    fits, shapes = known_by(run_dir, begin_s + after_s), shapes_of(run_dir)
    rows = []
    for trial_id, at_s, seen in windows(steps):
        if at_s < begin_s + after_s or trial_id not in shapes or seen.num_steps < MIN_STEPS:
            continue
        rows.append(
            {
                "trial": trial_id,
                "at_s": at_s - begin_s,
                "cores": seen.cores,
                "tier": seen.tier.value,
                "micro_batch": seen.micro_batch,
                "num_steps": seen.num_steps,
                "measured_s": seen.step_s,
                "predicted_s": predicted(fits.get(shapes[trial_id], NOTHING_FITTED), seen),
            }
        )
    return rows


def predicted(fit: TrialFit, seen: Observation) -> float | None:
    """Seconds per step at the settings of an observation; None for a tier that was not measured until then."""
    found = predict_step_s(
        fit,
        cores=seen.cores,
        micro_batch=seen.micro_batch,
        grad_accum=seen.grad_accum,
        tier=seen.tier,
        num_workers=seen.num_workers,
    )
    return None if found is None else found.step_s


def main() -> None:
    """One run, or those named before the options."""
    named = [Path(word) for word in sys.argv[1:] if not word.startswith("-") and Path(word).is_dir()]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if Path(word) not in named)]
    settings = options("prediction", repeats=1)
    report = Report(settings)
    afters, run_s = QUICK if settings.is_quick else (AFTER_S, RUN_S)
    with tempfile.TemporaryDirectory() as directory:
        runs = named or [make_run(Path(directory), run_s)]
        found = {f"{run.name}, after {after_s:g} s": errors(run, after_s) for run in runs for after_s in afters}
    for name, rows in found.items():
        is_asked = name.endswith(f"after {AFTER_S[-1]:g} s")
        known = [row for row in rows if row["predicted_s"] is not None]
        say(f"  {name}: {len(rows)} windows, {len(rows) - len(known)} without a prediction")
        if known:
            report.add(
                median_figure(
                    f"error of predicted throughput, {name}",
                    [abs(row["measured_s"] / row["predicted_s"] - 1) for row in known],
                    "ratio",
                    target=f"median <= {TARGET}" if is_asked else None,
                    is_met=(lambda value, _low, _high: value <= TARGET) if is_asked else None,
                    bootstrap=True,
                )
            )
            bias = statistics.median(row["measured_s"] / row["predicted_s"] - 1 for row in known)
            report.notes.append(f"{name}: median of measured over predicted step time, minus one: {bias:+.3f}")
    report.raw["windows"] = found
    report.notes.append(f"windows of {WINDOW_S:g} s under equal settings; throughput is the batch over the step time")
    report.write()


if __name__ == "__main__":
    main()
