"""Simulated against real: the makespan of the demo, once as it ran and once played again in the simulator.

The demo runs as a user starts it. Then its course is simulated with the same policy in closed loop, from the speeds
that its own telemetry shows, and from those of the other runs where they saw the same shapes. Where the search ended
each trial is taken as it was. `--repeats` is the number of runs, each with its own seed.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from orchestrator.policies import build_policy
from orchestrator.simulate.course import Course, course_of, play
from tests.bench.results_file import ROOT, Report, median_figure, options, say

DEMO = ROOT / "demo.yaml"
TARGET = 0.1
RUN_TIMEOUT_S = 280.0


def run_demo(directory: Path, seed: int, *, is_quick: bool) -> Path:
    """Run the demo with that seed; returns its run directory."""
    name = f"demo-{seed}"
    settings = [f"name={name}", f"storage={directory}", f"seed={seed}"]
    if is_quick:
        settings += ["trial.samples_per_report=512", "search.num_trials=2"]
    command = [sys.executable, "-m", "orchestrator", "run", str(DEMO), "--quiet"]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True, timeout=RUN_TIMEOUT_S, capture_output=True)
    return directory / name


def simulated_s(course: Course) -> float:
    """Makespan of a course under the demo's own policy."""
    policy = yaml.safe_load(DEMO.read_text())["policy"]
    return play(course, build_policy(policy["name"], policy.get("params")), policy["name"]).makespan_s


def with_speeds_of(course: Course, other: Course) -> Course | None:
    """The course with speeds and costs as another run showed them; None where that saw another shape."""
    if {view.shape for view in course.views.values()} - other.fits.keys():
        return None
    return dataclasses.replace(course, fits=other.fits, start_s=other.start_s, pause_s=other.pause_s)


def main() -> None:
    """Run the demo so many times and play each run again."""
    settings = options("simulated_run", repeats=2)
    report = Report(settings)
    with tempfile.TemporaryDirectory() as directory:
        courses = [
            course_of(run_demo(Path(directory), seed, is_quick=settings.is_quick)) for seed in range(settings.repeats)
        ]
    rows: list[dict[str, Any]] = []
    for course in courses:
        row: dict[str, Any] = {"run": course.run_id, "real_s": course.makespan_s, "own_s": simulated_s(course)}
        others = [with_speeds_of(course, other) for other in courses if other is not course]
        row["others_s"] = [simulated_s(other) for other in others if other is not None]
        row |= {"start_s": course.start_s, "pause_s": course.pause_s, "num_samples": dict(course.num_samples)}
        rows.append(row)
        say(
            f"  {row['run']}: real {row['real_s']:.1f} s, simulated {row['own_s']:.1f} s; "
            f"with others' speeds {row['others_s']}"
        )
    own = [abs(row["own_s"] / row["real_s"] - 1) for row in rows]
    report.add(
        median_figure(
            "makespan of the demo, simulated / real - 1 (speeds of the run)",
            own,
            "ratio",
            target=f"<= {TARGET}",
            is_met=lambda _value, _low, high: high <= TARGET,
        )
    )
    cross = [abs(value / row["real_s"] - 1) for row in rows for value in row["others_s"]]
    if cross:
        report.add(median_figure("  the same with the speeds of another run", cross, "ratio"))
    report.raw["runs"] = rows
    report.notes.append("makespan: from the first trial's assignment to the last one's end; opening slots is excluded")
    report.notes.append("taken from the run: when the search ended each trial, start and report costs, noise scales")
    report.write()


if __name__ == "__main__":
    main()
