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
    trial = {"samples_per_report": 48000, "max_reports": 6, "micro_batch": 16}
    path = run_file(tmp_path / "run.yaml", search=search, trial=trial)
    run = start("run", str(path), run_dir=tmp_path / "runs" / "r")
    held = "trial-00001"
    try:
        name = str(run.run_dir)
        run.wait_until(lambda: any(each["trial_id"] == held for each in run.of("result")), "its first report")
        Run(name).pause(held)
        run.wait_until(lambda: run.of("trial_paused"), "the trial has left")  # the search waits for it from here on
        paused = run.of("trial_paused")[0]
        added = [answer("add", name, "--set", "lr=0.01", "--request-id", "once")["trial_id"] for _ in range(2)]
        assert added == ["added-00000"] * 2
        assert answer("wait", name, "--until", "first-report")["is_reached"]
        cloned = Run(name).clone(held, lr=0.03)
        answer("set", name, "priority=2")
        refused = call("clone", name, "--trial", "nobody", "--json")
        assert refused.returncode == 2
        assert json.loads(refused.stdout)["error"]["code"] == "no_trial"
        answer("resume", name, "--trial", held)
        code, output = run.end()
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, output
    assert verify(run.run_dir)["violations"] == []
    states = {trial["trial_id"]: trial["state"] for trial in run.status["trials"]}
    assert states == dict.fromkeys(["trial-00000", "trial-00001", "added-00000", cloned], "done")
    went_on = next(e for e in run.of("trial_continued") if e["trial_id"] == held)
    assert (went_on["step"], went_on["checkpoint"]) == (paused["step"], paused["checkpoint"])
    steps = [entry["step"] for entry in run.of("result") if entry["trial_id"] == cloned]
    before = [
        entry["step"] for entry in run.of("result") if entry["trial_id"] == held and entry["step"] <= paused["step"]
    ]
    assert len(steps) == 6 - len(before), "it has the reports of the trial which it was cloned from"
    assert [entry["command"] for entry in run.of("request")] == ["pause", "add", "clone", "set", "resume"]
    assert all("@" in entry["by"] for entry in run.of("request"))
