"""One of two ranks runs out of memory in a real run: nothing hangs, nothing is lost, and the losses stay the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import orchestrator
from tests.integration.overflow.sitecustomize import FITS, MARKER
from tests.integration.runs import call, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_rank_out_of_memory_sends_both_back_to_the_commit_with_smaller_micro_batches(tmp_path: Path) -> None:
    changes = {
        "trial": {"samples_per_report": 768, "max_reports": 3, "micro_batch": 8, "num_workers": 2},
        "search": {
            # Two equal trials, one after the other in one slot; the first of them meets the fault.
            "space": {"lr": {"choice": [0.01]}},
            "num_trials": 2,
            "max_concurrent": 1,
            "scheduler": {"name": "fifo"},
        },
    }
    marker = tmp_path / "fired"
    faults = str(Path(__file__).parent / "overflow")
    environment = {"PYTHONPATH": os.pathsep.join([faults, os.environ.get("PYTHONPATH", "")]), MARKER: str(marker)}
    path = run_file(tmp_path / "run.yaml", **changes)
    run = start("run", str(path), run_dir=tmp_path / "runs" / "r", environment=environment)
    code, output = run.end()
    assert code == 0, output
    assert marker.exists(), "the fault was really met"
    assert json.loads(call("verify", str(run.run_dir), "--json").stdout)["violations"] == []

    (requeued,) = run.of("trial_requeued")
    assert requeued["num_overflows"] == 1
    assert requeued["num_restarts"] == 0, "that is no restart of the worker group"
    assert requeued["checkpoint"], "it goes on from its last commit"
    resume = requeued["resume"]
    assert resume["micro_batch"] <= FITS
    assert resume["micro_batch"] * resume["grad_accum"] == 8, "the same global batch"
    hit = requeued["trial_id"]
    acks = {(entry["trial_id"], entry["attempt"]): entry["settings"] for entry in run.of("ack")}
    assert acks[hit, 1]["micro_batch"] == resume["micro_batch"]
    attached = [entry for entry in run.of("slot") if entry["hello"]]
    assert len(attached) == 1, "the worker group is the same; only its process groups are new"

    found = results(run.run_dir)
    (other,) = {trial for trial, _ in found} - {hit}
    for index in range(3):
        (step, samples, metrics), (step_2, samples_2, metrics_2) = found[hit, index], found[other, index]
        assert (step, samples) == (step_2, samples_2)
        assert metrics["val_loss"] == pytest.approx(metrics_2["val_loss"], rel=1e-5)
    steps = orchestrator.load_run(run.run_dir).to_pandas("steps")
    last = steps[(steps["trial_id"] == hit) & (steps["attempt"] == 1) & (steps["rank"] == 0)]
    assert list(last["cursor"]) == list(range(768, 3 * 768, 16)), "the same samples in the same order, none twice"
