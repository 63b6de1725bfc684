"""A search whose trials share one process and are stepped as one, against the same search in slots of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import Started, call, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEARCH: dict[str, Any] = {
    "space": {"lr": {"loguniform": [0.002, 0.05]}},
    "num_trials": 10,
    "scheduler": {"name": "asha", "grace_reports": 1, "reduction_factor": 2},
}
TRIAL = {"samples_per_report": 1600, "max_reports": 4, "micro_batch": 16}


def search(directory: Path, name: str, *, lanes: int, max_concurrent: int) -> Started:
    path = run_file(
        directory / f"{name}.yaml",
        name=name,
        search={**SEARCH, "max_concurrent": max_concurrent},
        trial=TRIAL,
        slots={"lanes": lanes},
    )
    run = start("run", str(path), "--plain", run_dir=directory / "runs" / name)
    code, output = run.end()
    assert code == 0, output
    assert "Traceback" not in output
    return run


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Started:
    return search(tmp_path_factory.mktemp("lanes"), "together", lanes=8, max_concurrent=8)


def test_every_report_is_that_of_the_trial_in_a_slot_of_its_own(together: Started, tmp_path: Path) -> None:
    apart = results(search(tmp_path, "apart", lanes=1, max_concurrent=2).run_dir)
    found = results(together.run_dir)
    params = {entry["trial_id"]: entry["params"] for entry in together.of("trial_queued")}
    assert len(params) == 10
    common = found.keys() & apart.keys()
    assert {trial_id for trial_id, _ in common} == params.keys()  # each trial reported in both
    for key in common:
        (step, num_samples, metrics), (other_step, other_samples, others) = found[key], apart[key]
        assert (step, num_samples) == (other_step, other_samples)
        assert metrics["val_loss"] == pytest.approx(others["val_loss"], rel=1e-5)
    assert sum(index == 3 for _, index in found) < 10  # some were stopped


def test_all_of_them_were_in_one_process_as_a_bundle(together: Started) -> None:
    hellos = [entry["hello"] for entry in together.of("slot") if entry["hello"]]
    assert len({pid for hello in hellos for pid in hello["pids"]}) == 1
    assert sorted(hello["slot_id"] for hello in hellos) == [f"slot-0.{number}" for number in range(8)]
    logs = [path.read_text() for path in sorted((together.run_dir / "trials").glob("*/log.txt"))]
    assert len(logs) == 10
    assert sum("in a bundle" in log for log in logs) >= 8


def test_nothing_was_lost_and_nothing_is_left(together: Started) -> None:
    answer = call("verify", str(together.run_dir), "--json", "--checkpoints")
    assert json.loads(answer.stdout)["violations"] == []
    assert together.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}


def test_a_process_that_dies_takes_each_of_its_trials_back_to_its_commit(tmp_path: Path) -> None:
    def start_one(name: str) -> Started:
        path = run_file(
            tmp_path / f"{name}.yaml",
            name=name,
            search={**SEARCH, "num_trials": 4, "max_concurrent": 4, "scheduler": {"name": "fifo"}},
            trial={"samples_per_report": 16_000, "max_reports": 3, "micro_batch": 16},
            slots={"lanes": 4},
        )
        return start("run", str(path), "--plain", run_dir=tmp_path / "runs" / name)

    undisturbed = start_one("undisturbed")
    code, output = undisturbed.end()
    assert code == 0, output
    run = start_one("killed")
    run.wait_until(lambda: len(run.of("result")) >= 5, "five reports")
    os.kill(run.of("slot")[0]["hello"]["pids"][0], signal.SIGKILL)
    code, output = run.end()
    assert code == 0, output
    assert len(run.of("trial_requeued")) >= 3
    wanted, found = results(undisturbed.run_dir), results(run.run_dir)
    assert found.keys() == wanted.keys()
    for key, (step, num_samples, metrics) in wanted.items():
        assert found[key][:2] == (step, num_samples)
        assert found[key][2]["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
    assert json.loads(call("verify", str(run.run_dir), "--json").stdout)["violations"] == []
