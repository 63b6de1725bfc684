from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

import orchestrator
from orchestrator.errors import ConfigError
from orchestrator.telemetry.store import TelemetryWriter
from tests.run_directory import RunDirectory, healthy_run, records, status


def test_a_run_is_loaded_as_tables(tmp_path: Path) -> None:
    run = orchestrator.load_run(healthy_run(tmp_path).write())
    assert run.state == "done"
    assert run.steps.num_rows == 20
    assert run.steps["trial_id"].unique().to_pylist() == ["a", "b"]
    assert run.notes == ()
    row = run.plans.to_pylist()[2]
    assert {key: row[key] for key in ("generation", "trial_id", "share", "micro_batch", "grad_accum", "tier")} == {
        "generation": 2,
        "trial_id": "a",
        "share": 0.25,
        "micro_batch": 4,
        "grad_accum": 2,
        "tier": "bf16",
    }
    assert row["reason"] == "share 0.25 and tier bf16"
    assert (row["predicted_gain"], row["realised_gain"]) == (0.25, 0.2)
    assert run.plans["realised_gain"].to_pylist() == [None, None, 0.2, 0.2]


def test_trials_come_from_the_journal_when_there_is_no_status(tmp_path: Path) -> None:
    run = orchestrator.load_run(healthy_run(tmp_path).write())
    assert run.trials.select(["trial_id", "state", "step", "num_samples", "param.lr", "param.width"]).to_pylist() == [
        {"trial_id": name, "state": "done", "step": 10, "num_samples": 80, "param.lr": 0.1, "param.width": 32}
        for name in ("a", "b")
    ]


def test_a_paused_trial_is_called_so_when_there_is_no_status(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    run.log("trial_paused", trial_id="a", attempt=1, reason="made room", checkpoint=None, step=3, num_samples=24)
    assert orchestrator.load_run(run.write()).trials["state"].to_pylist() == ["paused"]


def test_the_status_tells_of_a_running_trial_and_the_journal_of_an_ended_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("trial-0001", "trial-0002")
    run.end("trial-0002", 3, 24, state="failed", reason="it broke")
    run.write()
    content = status(tmp_path)
    content["trials"][1]["state"] = "running"  # one second old
    content["trials"][0]["loss"] = "not a number"
    (tmp_path / "status.json").write_text(json.dumps(content))
    first, second = orchestrator.load_run(tmp_path).trials.to_pylist()
    assert (first["state"], first["step"], first["loss"], first["tier"]) == ("running", 1234, None, "bf16")
    assert (second["state"], second["step"], second["error"]) == ("failed", 3, "it broke")


def test_metrics_become_columns(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    writer = TelemetryWriter(run.telemetry)
    writer.append_results(
        [
            {"trial_id": "a", "index": 0, "metrics": {"val_loss": 0.5}, "checkpoint": "x"},
            {"trial_id": "a", "index": 1, "metrics": {"val_loss": None, "accuracy": 0.9}, "checkpoint": None},
        ]
    )
    writer.close()
    results = orchestrator.load_run(run.write()).results
    assert results["metric.val_loss"].to_pylist() == [0.5, None]
    assert results["metric.accuracy"].to_pylist() == [None, 0.9]


def test_a_run_that_goes_on_can_be_loaded(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    run.record("a", records(5))
    run.write(tail=b'{"kind":"off')
    (tmp_path / "status.json").write_text(json.dumps(status(tmp_path)))
    (segment,) = run.telemetry.iterdir()
    with segment.open("ab") as file:
        file.write(b"\xff\xff\xff\xff\x10")
    loaded = orchestrator.load_run(tmp_path)
    assert loaded.state == "running"
    assert loaded.steps.num_rows == 5
    assert len(loaded.notes) == 2


def test_damage_is_noted_and_the_rest_is_loaded(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.write()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    plan = next(number for number, line in enumerate(lines) if '"kind":"plan"' in line)
    lines[plan] = lines[plan].replace('"share":0.5', '"share":"half"')
    lines[2] = lines[2][:20]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    loaded = orchestrator.load_run(tmp_path)
    assert loaded.plans["generation"].to_pylist() == [2, 2]
    assert any("line 3" in note for note in loaded.notes)
    assert any("generation 1" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["steps", "devices", "results", "trials", "plans"])
def test_every_table_becomes_a_data_frame(tmp_path: Path, name: str) -> None:
    run = orchestrator.load_run(healthy_run(tmp_path).write())
    frame = run.to_pandas(name)
    table: pa.Table = getattr(run, name)
    assert list(frame.columns) == table.column_names
    assert len(frame) == table.num_rows


def test_an_unknown_table_is_named_with_those_that_exist(tmp_path: Path) -> None:
    run = orchestrator.load_run(healthy_run(tmp_path).write())
    with pytest.raises(ConfigError, match="'step'; allowed: steps, devices"):
        run.to_pandas("step")


def test_mixed_and_nested_parameters_become_text(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin()
    run.log("trial_queued", trial_id="a", params={"mixed": 1, "nested": [1, 2], "number": 1, "big": 2**70})
    run.log("trial_queued", trial_id="b", params={"mixed": "x", "number": 0.5})
    trials = orchestrator.load_run(run.write()).trials
    assert trials["param.mixed"].to_pylist() == ["1", '"x"']
    assert trials["param.nested"].to_pylist() == ["[1, 2]", None]
    assert trials["param.number"].to_pylist() == [1.0, 0.5]
    assert trials["param.big"].to_pylist() == [str(2**70), None]


def test_a_notebook_shows_names_without_running_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "<b>run")
    run.begin("<script>alert(1)</script>")
    text = orchestrator.load_run(run.write())._repr_html_()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>run" not in text


def test_a_directory_that_is_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        orchestrator.load_run(tmp_path / "nowhere")


def test_importing_the_package_brings_in_nothing_heavy() -> None:
    code = "import sys, orchestrator; print(*sorted({'pyarrow', 'torch', 'ray', 'numpy', 'rich'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert shown.stdout.strip() == ""


def test_the_public_names_exist_and_others_do_not() -> None:
    assert all(hasattr(orchestrator, name) for name in orchestrator.__all__)
    with pytest.raises(AttributeError, match="load_run"):
        _ = orchestrator.load_runs
