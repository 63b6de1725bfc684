"""What each job reaches on its small data, in how much time, and whether turning dials changes it.

`python -m tests.bench.bench_jobs JOB [--quick] [--repeats SEEDS] [--out FILE]`: for each seed two trials of the job's
search file are trained side by side, each on a core of its own, one with every dial turning and one with none.
`python -m tests.bench.bench_jobs searches ...`: every search file as a user runs it, and verified. `... simple`: only
what little thought reaches, for all jobs. Each has its own results file. Seconds are of an idle machine, unless the
file's load average says otherwise: then they are upper bounds.
`jobs/README.md` says why the targets are what they are.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.job_twin import search_file
from tests.bench.results_file import ROOT, Figure, Report, chosen_part, median_figure, options, say

LIMIT_S = 180.0
QUICK = ("trial.samples_per_report=512", "trial.max_reports=2")

TARGETS: dict[str, tuple[str, float]] = {
    "language": ("val_bits_per_byte", 2.49),
    "image": ("val_accuracy", 0.97),
    "tissue": ("val_dice", 0.975),
    "speech": ("val_word_error_rate", 0.1),
    "genome": ("val_auc", 0.945),
}
"""The metric that is looked at and what it must reach at the end of a trial without turning dials, median of seeds."""

LOWER_IS_BETTER = frozenset({"val_bits_per_byte", "val_word_error_rate"})


def twin(job: str, seed: int, core: int, *, turns: bool, overrides: tuple[str, ...]) -> dict[str, Any]:
    """One trial in a process on a core of its own; its seconds are those of the whole process."""
    kind = "turning" if turns else "still"
    command = [sys.executable, "-m", "tests.bench.job_twin", job, str(seed), kind, *overrides]
    began_s = time.monotonic()
    done = subprocess.run(
        ["taskset", "-c", str(core), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": time.monotonic() - began_s}


def twins(job: str, seeds: int, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """Both trials of every seed, two at a time; of odd seeds the cores change sides."""
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    found = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for seed in range(seeds):
            pair = [
                pool.submit(twin, job, seed, cores[(seed + turns) % 2], turns=turns, overrides=overrides)
                for turns in (False, True)
            ]
            found += [each.result() for each in pair]
            say(f"  seed {seed}: " + ", ".join(f"{each['seconds']:.0f} s" for each in found[-2:]))
    return found


def search(job: str, overrides: tuple[str, ...], storage: str) -> dict[str, Any]:
    """The search file as a user runs it, and what `verify` says of it."""
    sets = [word for each in (f"storage={storage}", "name=search", *overrides) for word in ("--set", each)]
    command = [sys.executable, "-m", "orchestrator"]
    began_s = time.monotonic()
    done = subprocess.run(
        [*command, "run", str(search_file(job)), "--quiet", *sets],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began_s
    if done.returncode:
        raise RuntimeError(f"the search failed:\n{(done.stdout + done.stderr)[-4000:]}")
    run_dir = Path(done.stdout.split()[-1])
    checked = subprocess.run([*command, "verify", str(run_dir)], cwd=ROOT, capture_output=True, text=True, check=False)
    status = json.loads((run_dir / "status.json").read_text())
    return {
        "seconds": seconds,
        "verify": checked.returncode,
        "verify_says": checked.stdout.splitlines()[-1:],
        "dials": status["dials"],
        "metric": status["metric"],
        "trials": [
            {key: trial[key] for key in ("trial_id", "state", "metric_value", "num_samples", "params")}
            for trial in status["trials"]
        ],
    }


def add_figures(report: Report, job: str, found: list[dict[str, Any]]) -> None:
    """Quality, seconds, and what turning made of the loss."""
    metric, target = TARGETS[job]
    still, turning = ([each for each in found if each["turns"] == turns] for turns in (False, True))

    def ends(trials: list[dict[str, Any]], key: str) -> list[float]:
        return [float(each["reports"][-1][key]) for each in trials]

    is_lower = metric in LOWER_IS_BETTER
    report.add(
        median_figure(
            f"{metric}, no dial turning",
            ends(still, metric),
            "",
            target=f"{'<=' if is_lower else '>='} {target}",
            is_met=lambda value, _low, _high: value <= target if is_lower else value >= target,
        )
    )
    report.add(median_figure(f"{metric}, every dial turning", ends(turning, metric), ""))
    for name, trials in (("no dial turning", still), ("every dial turning", turning)):
        report.add(
            median_figure(
                f"seconds of a trial on one core, {name}",
                [each["seconds"] for each in trials],
                "s",
                target=f"<= {LIMIT_S:g} s",
                is_met=lambda _value, _low, high: high <= LIMIT_S,
            )
        )
        report.add(median_figure(f"  CPU seconds of it, {name}", [each["cpu_s"] for each in trials], "s"))
    report.add(_gap(ends(still, "val_loss"), ends(turning, "val_loss")))


def _gap(still: list[float], turning: list[float]) -> Figure:
    """Difference of the mean losses, against what another seed makes of it."""
    differences = [after - before for before, after in zip(still, turning, strict=True)]
    gap = statistics.mean(differences)
    spread = statistics.stdev(still) if len(still) > 1 else 0.0
    return Figure(
        name="val_loss, turning less still",
        value=gap,
        statistic="mean of pairs",
        unit="nats",
        low=-spread,
        high=spread,
        spread="standard deviation over seeds, no dial turning",
        values=differences,
        target="within the standard deviation over seeds",
        is_met=abs(gap) <= spread if len(still) > 1 else None,
    )


def measure_job(report: Report, job: str, overrides: tuple[str, ...]) -> None:
    """The twins of one job, and what little thought reaches on the same data."""
    found = twins(job, report.options.repeats, overrides)
    report.raw["twins"] = found
    add_figures(report, job, found)
    add_simple_answers(report, job, overrides)


def add_simple_answers(report: Report, job: str, overrides: tuple[str, ...]) -> None:
    """What little thought reaches on the data of a job."""
    for name, value in _simple_answers(job, overrides):
        report.add(median_figure(f"  {job}, {TARGETS[job][0]}: {name}", [value], ""))


def measure_searches(report: Report, overrides: tuple[str, ...]) -> None:
    """Every search file, one after the other."""
    for job in TARGETS:
        with tempfile.TemporaryDirectory() as storage:
            report.raw[job] = one = search(job, overrides, storage)
        name, target = f"{job}: seconds of the whole search, both cores", f"<= {LIMIT_S:g} s"
        report.add(median_figure(name, [one["seconds"]], "s", target=target, is_met=lambda value, *_: value <= LIMIT_S))
        name = f"{job}: exit code of verify"
        report.add(median_figure(name, [one["verify"]], "", target="0", is_met=lambda value, *_: value == 0))
        values = [trial["metric_value"] for trial in one["trials"] if trial["metric_value"] is not None]
        report.add(median_figure(f"{job}: {one['metric']} of each trial's last report", values, ""))


def main() -> None:
    """What the command line says."""
    parts = (*TARGETS, "searches", "simple")
    part = chosen_part(parts)
    report = Report(options(f"jobs_{part}", repeats=5 if part in TARGETS else 1))
    overrides = QUICK if report.options.is_quick else ()
    if part == "searches":
        measure_searches(report, overrides)
    elif part == "simple":
        for job in TARGETS:
            add_simple_answers(report, job, overrides)
    else:
        measure_job(report, part, overrides)
    report.write()


def _simple_answers(job: str, overrides: tuple[str, ...]) -> list[tuple[str, float]]:
    from orchestrator.config import load_config
    from tests.bench.job_baselines import answers

    return answers(job, dict(load_config(search_file(job), overrides).config.job.params))


if __name__ == "__main__":
    main()
