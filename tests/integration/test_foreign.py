"""The trainings of `tests/foreign`, unchanged, in whole runs: every step's loss is that of the same file by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.telemetry.load import load_run
from tests.foreign.losses import run_plain, step_means
from tests.foreign.test_standalone import skip_without_its_libraries
from tests.foreign.trainings import ROOT, TRAININGS, ForeignTraining
from tests.integration.runs import call, results, run_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


IN_EVERY_TEST_RUN = frozenset({"ray_train_loop", "hf_trainer", "lightning_trainer"})
"""One for each way in which results reach the search. A whole run takes half a minute, most of it Ray's, and the driver
is tried with all twelve in `tests/foreign`; the others' whole runs are `make foreign`."""


def _with_marks(training: ForeignTraining) -> object:
    marks = () if training.name in IN_EVERY_TEST_RUN else (pytest.mark.foreign,)
    return pytest.param(training, id=training.name, marks=marks)


@pytest.mark.parametrize("training", [_with_marks(training) for training in TRAININGS])
def test_a_foreign_training_is_a_trial(training: ForeignTraining, tmp_path: Path) -> None:
    skip_without_its_libraries(training)
    params = {"seed": 5, **training.params}
    (tmp_path / "plain").mkdir()
    plain, _ = run_plain(training, tmp_path / "plain", params)
    seed = params.pop("seed")
    path = run_file(
        tmp_path / "run.yaml",
        job={"name": training.import_path, "params": params, "import_paths": [str(ROOT)]},
        search={
            "metric": training.metric,
            "mode": training.mode,
            "space": {"seed": {"choice": [seed]}},
            "num_trials": 1,
            "max_concurrent": 1,
            "scheduler": {"name": "fifo"},
        },
        trial={"share": 1 / len(os.sched_getaffinity(0))},  # one core, as the twin: sums differ with their threads
    )
    run_dir = tmp_path / "runs" / "r"
    ran = call("run", str(path), "--plain")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (trial,) = json.loads((run_dir / "status.json").read_text())["trials"]
    assert trial["state"] == "done"
    assert len(results(run_dir)) == training.num_reports
    steps = load_run(run_dir).steps.to_pydict()
    assert steps["loss"] == pytest.approx(step_means(plain.steps), rel=1e-5)
    checked = call("verify", str(run_dir), "--json")
    assert checked.returncode == 0, checked.stdout
