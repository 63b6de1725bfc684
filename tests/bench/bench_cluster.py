"""Nodes that come and go during a search, and a run as a job that is stopped and resumed: how long each takes.

Several Ray nodes on one machine, which share its cores; a real head with token authentication for the job. The stories
are those of the integration tests, told once per repeat.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.control.journal import read
from orchestrator.submit import STOP_WAIT_S, Packages, submit
from orchestrator.view.verify import verify
from tests.bench.orchestrated import scratch
from tests.bench.results_file import Report, median_figure, options, say
from tests.integration.heads import ray_head
from tests.integration.node_story import tell
from tests.integration.runs import run_file

TARGETS_S = {
    "joined -> in the ledger": 5.0,
    "joined -> share granted": 10.0,
    "joined -> first step on it": 30.0,
    "drained -> first new step of its trial": 30.0,
    "lost -> first new step of its trials": 30.0,
}


def nodes(directory: Path) -> dict[str, Any]:
    """The story of the nodes: seconds after each cause, trials and samples lost."""
    story = tell(directory)
    lost = [found for found in story.violations if "sample" in str(found["code"])]
    ended = {trial["trial_id"]: trial["state"] for trial in story.run.status["trials"]}
    return {
        "seconds": story.times,
        "trials_lost": sum(state == "failed" for state in ended.values()),
        "samples_lost_or_repeated": len(lost),
        "violations": story.violations,
        "steps_lost_at_drain": _steps_lost(story.run.run_dir, story.drained[0]),
    }


def job(directory: Path) -> dict[str, Any]:
    """A job that is stopped in the middle and resumed: seconds, and what that cost."""
    work = directory / "work"
    work.mkdir()
    run_file(work / "run.yaml", storage=str(directory / "runs"))
    with ray_head(num_cpus=2) as head:
        run = submit("run.yaml", Packages(working_dir=work, python=sys.executable), address=head.dashboard)
        began_s = time.monotonic()
        while not _entries(run.run_dir, "result"):
            if time.monotonic() - began_s > 180.0:
                raise RuntimeError(f"the job has not reported: {run.status()}")
            time.sleep(0.1)
        began_s = time.monotonic()
        stopped = run.stop()
        stop_s = time.monotonic() - began_s
        left = _entries(run.run_dir, "trial_requeued")
        committed_s = max(entry["t_s"] for entry in left) - began_s
        is_in_time = all(Path(entry["checkpoint"]).is_dir() for entry in left) and stop_s < STOP_WAIT_S
        steps_lost = sum(_steps_lost(run.run_dir, entry) for entry in left)
        resumed = run.resume().follow(lambda _line: None, 300.0)
    return {
        "stopped": stopped,
        "stop_s": stop_s,
        "committed_s": committed_s,
        "is_in_time": is_in_time,
        "steps_lost": steps_lost,
        "resumed": resumed,
        "violations": verify(run.run_dir)["violations"],
    }


def _entries(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    path = run_dir / "journal.jsonl"
    return [entry for entry in read(path) if entry["kind"] == kind] if path.exists() else []


def _steps_lost(run_dir: Path, requeued: dict[str, Any]) -> int:
    """Steps that the attempt which was given back had done beyond the commit it left."""
    steps = orchestrator.load_run(run_dir).steps.to_pandas()
    own = steps[(steps.trial_id == requeued["trial_id"]) & (steps.attempt == requeued["attempt"] - 1)]
    return max(0, int(own.step.max()) + 1 - int(Path(requeued["checkpoint"]).name.removeprefix("step-")))


def add_figures(report: Report, found: list[dict[str, dict[str, Any]]]) -> None:
    """All figures, each over the repeats."""
    for name in found[0]["nodes"]["seconds"]:
        values = [one["nodes"]["seconds"][name] for one in found]
        target = TARGETS_S.get(name)
        if target is None:
            report.add(median_figure(f"node {name}", values, "s"))
        else:
            report.add(_at_most(f"node {name}", values, "s", target))
    for name, words in (
        ("trials_lost", "trials lost"),
        ("samples_lost_or_repeated", "samples lost or repeated"),
        ("steps_lost_at_drain", "steps lost when a node drains"),
    ):
        report.add(_at_most(words, [float(one["nodes"][name]) for one in found], "", 0.0))
    report.add(median_figure("job stop -> all trials committed", [one["job"]["committed_s"] for one in found], "s"))
    report.add(_at_most("job stop -> job ended", [one["job"]["stop_s"] for one in found], "s", float(STOP_WAIT_S)))
    report.add(_at_most("steps lost after job stop", [float(one["job"]["steps_lost"]) for one in found], "", 0.0))
    in_time = [float(one["job"]["is_in_time"]) for one in found]
    report.add(
        median_figure(
            "checkpoints written within the grace period",
            in_time,
            "",
            target="always",
            is_met=lambda _value, low, _high: low == 1,
        )
    )


def _at_most(name: str, values: list[float], unit: str, target: float) -> Any:
    return median_figure(
        name, values, unit, target=f"<= {target:g} {unit}".strip(), is_met=lambda value, _low, _high: value <= target
    )


def main() -> None:
    """Tell both stories, so many times."""
    settings = options("cluster", repeats=1)
    report = Report(settings)
    found = []
    with pytest.MonkeyPatch.context() as patch, scratch() as directory:  # before Ray is imported, which reads it once
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_TMPDIR", str(directory))
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text("0123456789abcdef" * 4)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        for number in range(settings.repeats):
            place = directory / str(number)
            (place / "nodes").mkdir(parents=True)
            (place / "job").mkdir()
            found.append({"nodes": nodes(place / "nodes"), "job": job(place / "job")})
            say(f"  repeat {number}: {found[-1]}")
    report.raw["repeats"] = found
    report.notes.append("nodes are Ray nodes of one machine and share its cores; a cloud's boot time is not in this")
    report.notes.append("joined: after cluster_utils has started the node's raylet; lost: the raylet was killed")
    add_figures(report, found)
    report.write()


if __name__ == "__main__":
    main()
