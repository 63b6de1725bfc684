"""`orchestrator stop` on a search that a user has opened, in a process of its own, and its restoration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.view.verify import verify
from tests.integration.runs import Started, call, run_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAX_REPORTS = 4

OWN_SEARCH = """
import sys
from ray import tune
import orchestrator.tune

run_file, results_dir, mode = sys.argv[1:]
with orchestrator.tune.trainable(run_file, resume=mode == "restore") as trainable:
    if mode == "restore":
        tuner = tune.Tuner.restore(results_dir + "/own", trainable=trainable)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"lr": tune.grid_search([0.05, 0.02, 0.01])},
            tune_config=tune.TuneConfig(metric="val_loss", mode="min", reuse_actors=True),
            run_config=tune.RunConfig(name="own", storage_path=results_dir, verbose=0),
        )
    results = tuner.fit()
    print("iterations", sorted((r.metrics or {}).get("training_iteration", 0) for r in results), flush=True)
"""


def test_stop_reaches_a_search_of_the_users_own_and_restore_goes_on(tmp_path: Path) -> None:
    changes = {"trial": {"samples_per_report": 48000, "max_reports": MAX_REPORTS, "micro_batch": 16}}
    path = run_file(tmp_path / "run.yaml", **changes)
    (tmp_path / "own.py").write_text(OWN_SEARCH)
    run_dir = tmp_path / "runs" / "r"

    def search(mode: str) -> Started:
        arguments = [sys.executable, str(tmp_path / "own.py"), str(path), str(tmp_path / "results"), mode]
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        return Started(process, run_dir)

    run = search("fit")
    try:
        run.wait_until(lambda: run.of("result"), "a report")
        stopped = call("stop", str(run_dir))
        assert stopped.returncode == 0, stopped.stderr
        code, output = run.end()
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, output
    assert "iterations" in output, "the user's own code behind fit() ran on"
    (ended,) = run.of("run_ended")
    assert (ended["state"], ended["leaks"]) == ("interrupted", {"actors": 0, "placement_groups": 0})
    left = [entry for kind in ("trial_paused", "trial_requeued") for entry in run.of(kind)]
    assert any(entry["checkpoint"] for entry in left), "those that ran have committed"
    assert not run.of("trial_ended") or len(run.of("trial_ended")) < 3, "there is something left to do"
    again = search("restore")
    code, output = again.end()
    assert code == 0, output
    assert f"iterations {[MAX_REPORTS] * 3}" in output
    assert again.of("run_ended")[-1]["state"] == "done"
    by_trial: dict[str, list[int]] = {}
    for entry in again.of("result"):
        by_trial.setdefault(entry["trial_id"], []).append(entry["index"])
    assert sorted(by_trial.values()) == [list(range(MAX_REPORTS))] * 3, "no report was made twice"
    assert verify(run_dir)["violations"] == []
