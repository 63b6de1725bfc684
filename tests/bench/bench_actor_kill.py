"""The policy actor is killed in the middle of the demo: how soon it is back, and whether any step waited for it.

Back means that the restarted actor has read its journal and has written so there. A step is blocked if it took longer
than usual by most of the time the actor was away; the longest step in that time stands beside the longest before it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orchestrator
from orchestrator.control.journal import read
from orchestrator.view.terminal import read_status
from tests.bench.orchestrated import scratch
from tests.bench.results_file import ROOT, Options, Report, median_figure, options

BACK_LIMIT_S = 5.0
_AWAY_LEAST_S = 0.5
"""An actor is never back sooner, so a step that waited for it took at least this much longer than usual."""


def run_demo(directory: Path, name: str) -> dict[str, Any]:
    """One demo with one kill."""
    command = [sys.executable, "-m", "orchestrator", "run", str(ROOT / "demo.yaml"), "--plain"]
    command += ["--set", f"name={name}", "--set", f"storage={directory}"]
    run_dir = directory / name
    with (directory / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            killed = _kill_when_busy(run_dir, process)
            code = process.wait(timeout=300.0)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        raise RuntimeError(f"the demo ended with {code}: {(directory / f'{name}.log').read_text()[-2000:]}")
    back_s = next(entry["t_s"] for entry in read(run_dir / "journal.jsonl") if entry["kind"] == "recovered")
    verified = subprocess.run(
        [sys.executable, "-m", "orchestrator", "verify", str(run_dir)], capture_output=True, text=True, check=False
    )
    return {
        "back_s": back_s - killed["at_s"],
        "verify": verified.returncode,
        **_steps_around(run_dir, killed["at_s"], back_s),
    }


def _kill_when_busy(run_dir: Path, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Kill the actor once two trials train and a plan has been applied."""
    deadline_s = time.monotonic() + 120.0
    while time.monotonic() < deadline_s and process.poll() is None:
        status = read_status(run_dir / "status.json") or {}
        busy = [
            trial for trial in status.get("trials", []) if trial["state"] == "running" and (trial["step"] or 0) > 50
        ]
        if len(busy) >= 2 and sum(dial["changes_applied"] for dial in status["dials"].values()):
            os.kill(int(status["actor_pid"]), signal.SIGKILL)
            return {"at_s": time.monotonic()}
        time.sleep(0.02)
    raise RuntimeError("two trials never trained side by side")


def _steps_around(run_dir: Path, killed_s: float, back_s: float) -> dict[str, Any]:
    """The steps that ran without an actor, and their waiting, against the same length of time before."""
    steps = orchestrator.load_run(run_dir).to_pandas("steps")
    away_s = back_s - killed_s
    end_s = steps["start_s"] + steps["step_s"]
    during = steps[(steps["start_s"] < back_s) & (end_s > killed_s)]
    before = steps[(steps["start_s"] < killed_s) & (end_s > killed_s - max(away_s, 2.0))]
    blocked = during[during["step_s"] > before["step_s"].median() + max(_AWAY_LEAST_S, 0.8 * away_s)]
    return {
        "steps_without_actor": len(during),
        "steps_blocked": len(blocked),
        "longest_step_without_actor_s": float(during["step_s"].max()),
        "longest_step_before_s": float(before["step_s"].max()),
    }


def main() -> None:
    """Run the demo so many times, each time with one kill."""
    settings: Options = options("actor_kill", repeats=3)
    report = Report(settings)
    with scratch() as directory:
        runs = []
        for number in range(settings.repeats):
            runs.append(run_demo(directory, f"demo{number}"))
            shutil.rmtree(directory / f"demo{number}")
    report.raw["runs"] = runs
    report.add(
        median_figure(
            "actor killed in the demo: back after",
            [run["back_s"] for run in runs],
            "s",
            target=f"every one <= {BACK_LIMIT_S:g} s",
            is_met=lambda _value, _low, high: high <= BACK_LIMIT_S,
        )
    )
    report.add(
        median_figure(
            "  steps blocked meanwhile",
            [float(run["steps_blocked"]) for run in runs],
            "steps",
            target="every one 0",
            is_met=lambda _value, _low, high: high == 0,
        )
    )
    report.add(median_figure("  steps done meanwhile", [float(run["steps_without_actor"]) for run in runs], "steps"))
    for key, name in (("longest_step_without_actor_s", "meanwhile"), ("longest_step_before_s", "before")):
        report.add(median_figure(f"  longest step {name}", [run[key] for run in runs], "s"))
    report.add(
        median_figure(
            "  findings of verify (exit code)",
            [float(run["verify"]) for run in runs],
            "",
            target="every one 0",
            is_met=lambda _value, _low, high: high == 0,
        )
    )
    report.write()


if __name__ == "__main__":
    main()
