"""A live search is steered from the command line and from Python, and ends well with all that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import Run
from orchestrator.view.verify import verify
from tests.integration.runs import call, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def answer(*arguments: str) -> dict[str, Any]:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_trials_are_added_cloned_paused_and_resumed_while_a_search_goes_on(tmp_path: Path) -> None:
    search = {"space": {"lr": {"loguniform": [0.002, 0.05]}}, "num_trials": 2, "max_concurrent": 2}
    run = start("run", str(run_file(tmp_path / "run.yaml", search=search)), run_dir=tmp_path / "runs" / "r")
    try:
        name = str(run.run_dir)
        run.wait_until(lambda: run.of("trial_queued"), "a trial")
        added = [answer("add", name, "--set", "lr=0.01", "--request-id", "once")["trial_id"] for _ in range(2)]
        assert added == ["added-00000"] * 2
        assert answer("wait", name, "--until", "first-report")["is_reached"]
        first = run.of("result")[0]["trial_id"]
        cloned = Run(name).clone(first, lr=0.03)
        other = next(entry["trial_id"] for entry in run.of("trial_assigned") if entry["trial_id"] != first)
        assert answer("pause", name, "--trial", other)["trial_id"] == other
        run.wait_until(lambda: run.of("trial_paused"), "the trial has left")
        paused = run.of("trial_paused")[0]
        answer("set", name, "priority=2")
        refused = call("clone", name, "--trial", "nobody", "--json")
        assert refused.returncode == 2
        assert json.loads(refused.stdout)["error"]["code"] == "no_trial"
        answer("resume", name, "--trial", other)
        code, output = run.end()
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, output
    assert verify(run.run_dir)["violations"] == []
    states = {trial["trial_id"]: trial["state"] for trial in run.status["trials"]}
    assert states == dict.fromkeys(["trial-00000", "trial-00001", "added-00000", cloned], "done")
    went_on = next(e for e in run.of("trial_continued") if e["trial_id"] == other)
    assert (went_on["step"], went_on["checkpoint"]) == (paused["step"], paused["checkpoint"])
    steps = [entry["step"] for entry in run.of("result") if entry["trial_id"] == cloned]
    assert len(steps) == 2, "its first report is that of the trial which it was cloned from"
    assert [entry["command"] for entry in run.of("request")] == ["add", "clone", "pause", "set", "resume"]
    assert all("@" in entry["by"] for entry in run.of("request"))
