"""Whole runs from the command line: what they leave, what faults do to them, and how they are taken up again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

import orchestrator
from tests.integration.runs import Started, call, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def violations(run_dir: Path) -> list[object]:
    answer = call("verify", str(run_dir), "--json")
    found: list[object] = json.loads(answer.stdout)["violations"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Started, int, str]:
    """A static run without any fault."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run = start("run", str(run_file(directory / "run.yaml")), run_dir=directory / "runs" / "r")
    code, output = run.end()
    return run, code, output


def test_a_run_ends_well_and_says_where_everything_is(undisturbed: tuple[Started, int, str]) -> None:
    run, code, output = undisturbed
    assert code == 0, output
    assert output.strip().splitlines()[-1] == str(run.run_dir)
    assert "Traceback" not in output
    assert violations(run.run_dir) == []
    assert run.status["state"] == "done"
    assert [trial["state"] for trial in run.status["trials"]] == ["done"] * 3
    assert all(entry["verdict"] == "held" for entry in run.of("check") if entry["what"] == "compute"), run.of("check")


def test_nothing_is_left_of_a_run(undisturbed: tuple[Started, int, str]) -> None:
    run, _, _ = undisturbed
    ended = run.of("run_ended")[-1]
    assert ended["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
    pids = [pid for entry in run.of("slot") if entry["hello"] for pid in entry["hello"]["pids"]]
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in [*pids, run.status["actor_pid"]])


def test_its_tables_hold_every_step(undisturbed: tuple[Started, int, str]) -> None:
    run, _, _ = undisturbed
    tables = orchestrator.load_run(run.run_dir)
    assert tables.steps.num_rows == 3 * 9000
    assert tables.results.num_rows == 9
    assert tables.plans.num_rows >= 3


def test_every_decision_can_be_explained(undisturbed: tuple[Started, int, str]) -> None:
    run, _, _ = undisturbed
    answer = json.loads(call("explain", str(run.run_dir), "--decision", "1", "--json").stdout)
    assert answer["generation"] == 1
    assert set(answer) >= {
        "reason",
        "chosen",
        "alternatives",
        "binding",
        "predicted_gain",
        "realised_gain",
        "applied",
    }
    assert answer["applied"]


def test_of_trials_that_reach_a_rung_together_the_better_goes_on_whoever_came_first(tmp_path: Path) -> None:
    search = {
        "space": {"lr": {"grid": [10.0, 0.02]}},
        "num_trials": 2,
        "max_concurrent": 2,
        "algorithm": "grid",
        "scheduler": {"name": "asha", "rung_patience": 1.0},
    }
    run = start("run", str(run_file(tmp_path / "run.yaml", search=search)), run_dir=tmp_path / "runs" / "r")
    code, output = run.end()
    assert code == 0, output
    told = [(entry["trial_id"], entry["index"], entry["place"]) for entry in run.of("told")]
    assert told[:2] == [("trial-00001", 0, 0), ("trial-00000", 0, 1)], "the better first"
    losses = {entry["trial_id"]: entry["metrics"]["val_loss"] for entry in run.of("result") if entry["index"] == 0}
    assert losses["trial-00001"] < losses["trial-00000"]
    assert {trial["trial_id"]: trial["state"] for trial in run.status["trials"]} == {
        "trial-00000": "stopped",
        "trial-00001": "done",
    }
    assert violations(run.run_dir) == []


def test_a_finished_run_is_neither_started_nor_resumed_again(
    undisturbed: tuple[Started, int, str], tmp_path: Path
) -> None:
    run, _, _ = undisturbed
    again = call("run", str(run.run_dir.parent.parent / "run.yaml"))
    assert again.returncode == 2
    assert "exists" in again.stderr
    resumed = call("resume", str(run.run_dir))
    assert resumed.returncode == 2
    assert "nothing to resume" in resumed.stderr


def test_killed_workers_and_a_killed_actor_change_no_result(
    undisturbed: tuple[Started, int, str], tmp_path: Path
) -> None:
    run = start("run", str(run_file(tmp_path / "run.yaml")), run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: run.of("result"), "the first report")
    assigned = run.of("trial_assigned")[0]
    hello = next(entry["hello"] for entry in run.of("slot") if entry["slot_id"] == assigned["slot_id"])
    os.kill(hello["pids"][0], signal.SIGKILL)
    run.wait_until(lambda: run.of("trial_requeued"), "the trial was given back")
    run.wait_until(lambda: run.status.get("actor_pid"), "the actor said who it is")
    actor_pid = run.status["actor_pid"]
    os.kill(actor_pid, signal.SIGKILL)
    run.wait_until(lambda: run.of("recovered"), "the actor came back")
    code, output = run.end()
    assert code == 0, output
    assert violations(run.run_dir) == []
    assert run.of("trial_requeued"), "the worker was really killed"
    assert run.status["actor_pid"] != actor_pid, "the actor was really killed"
    assert results(run.run_dir) == results(undisturbed[0].run_dir), "bit-equal to the undisturbed run"


def test_an_interrupted_run_is_resumed_without_losing_a_step(
    undisturbed: tuple[Started, int, str], tmp_path: Path
) -> None:
    run = start("run", str(run_file(tmp_path / "run.yaml")), run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: len(run.of("result")) >= 2, "two reports")
    stopped = call("stop", str(run.run_dir))
    assert stopped.returncode == 0, stopped.stderr
    code, output = run.end()
    assert code == 130, output
    assert run.status["state"] == "interrupted"
    assert run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
    interrupted = [entry for entry in run.of("trial_requeued") if "interrupted" in entry["reason"]]
    assert interrupted
    assert all(Path(entry["checkpoint"]).is_dir() for entry in interrupted)
    resumed = start("resume", str(run.run_dir), run_dir=run.run_dir)
    code, output = resumed.end()
    assert code == 0, output
    assert violations(run.run_dir) == []
    assert results(run.run_dir) == results(undisturbed[0].run_dir), "bit-equal to the undisturbed run"


def test_two_interrupts_stop_at_once_and_leave_nothing(tmp_path: Path) -> None:
    run = start("run", str(run_file(tmp_path / "run.yaml")), run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: run.of("ack"), "training began")
    tree = psutil.Process(run.process.pid).children(recursive=True)
    assert tree
    run.interrupt()
    run.wait_until(lambda: run.of("trial_stop"), "the first interrupt was taken")
    run.interrupt()
    code, output = run.end()
    assert code == 130, output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(tree, timeout=10.0)
    assert alive == []


def test_a_slot_whose_controller_dies_is_opened_again(undisturbed: tuple[Started, int, str], tmp_path: Path) -> None:
    run = start("run", str(run_file(tmp_path / "run.yaml")), run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: len(run.of("ack")) >= 2, "both slots train")
    children = psutil.Process(run.process.pid).children(recursive=True)
    controllers = [child for child in children if "ray::TrainController" in " ".join(child.cmdline())]
    assert len(controllers) == 2
    controllers[0].kill()
    run.wait_until(lambda: [entry for entry in run.of("slot") if entry["state"] == "lost"], "the loss was seen")
    code, output = run.end()
    assert code == 0, output
    assert violations(run.run_dir) == []
    assert results(run.run_dir) == results(undisturbed[0].run_dir), "bit-equal to the undisturbed run"


def test_two_ranks_with_every_dial_turning_and_the_guard_acting(
    undisturbed: tuple[Started, int, str], tmp_path: Path
) -> None:
    changes = {
        "trial": {"samples_per_report": 24000, "max_reports": 2, "micro_batch": 8, "num_workers": 2},
        "search": {
            "space": {"lr": {"loguniform": [0.002, 0.05]}},
            "num_trials": 2,
            "max_concurrent": 1,
            "scheduler": {"name": "asha"},
        },
        # In the last tier every weight becomes zero.
        "dials": {"precision": {"tiers": ["fp32", "bf16", "fixed(2,6)"], "exchange": "tier"}},
        "policy": {"name": "tests.integration.reckless:Reckless", "params": {"cooldown_s": 0.5}},
    }
    run = start("run", str(run_file(tmp_path / "run.yaml", **changes)), run_dir=tmp_path / "runs" / "r")
    code, output = run.end()
    assert code == 0, output
    assert violations(run.run_dir) == []
    assert run.status["dials"]["batch"]["changes_applied"] >= 1
    assert all(trial["num_workers"] == 2 for trial in run.status["trials"])
    steps = orchestrator.load_run(run.run_dir).steps.to_pandas()
    assert set(steps["rank"]) == {0, 1}
    moves = [entry for entry in run.of("override") if "vanishes" in entry["reason"]]
    assert {move["trial_id"] for move in moves} == {trial["trial_id"] for trial in run.status["trials"]}
    assert all(move["settings"]["tier"] in {"fp32", "bf16"} for move in moves)
    tiers = steps[steps["rank"] == 0].groupby("trial_id", observed=True)["tier"]
    assert ((tiers.apply(lambda tier: (tier == "fixed(k=2,bits=6)").mean())) < 0.25).all()
    assert set(tiers.last()) <= {"fp32", "bf16"}
    assert steps["loss"].notna().all()


def test_a_trial_grows_to_two_ranks_and_back_while_it_runs(tmp_path: Path) -> None:
    changes = {
        "search": {"space": {"lr": {"loguniform": [0.002, 0.05]}}, "num_trials": 1, "max_concurrent": 1},
        # Without an end: how long a second worker group takes to open depends on the machine, so the test ends it.
        "trial": {"samples_per_report": 32000, "max_reports": 10000, "micro_batch": 16, "share": 0.25},
        "dials": {
            "share": {"enabled": False},
            "batch": {"enabled": False},
            "precision": {"enabled": False},
            "workers": {"enabled": True, "min": 1, "max": 2},
        },
        "policy": {"name": "tests.resizing_policy:ThereAndBack"},
        "slots": {"open_timeout_s": 240.0, "idle_close_s": 600.0},
    }
    run = start("run", str(run_file(tmp_path / "run.yaml", **changes)), run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: [e for e in run.of("trial_resize") if e["stage"] == "done"][1:], "there and back")
    so_far = len(run.of("result"))
    run.wait_until(lambda: len(run.of("result")) > so_far, "a report of one rank again")
    stopped = call("stop", str(run.run_dir))
    assert stopped.returncode == 0, stopped.stderr
    code, output = run.end()
    assert code == 130, output
    assert violations(run.run_dir) == []
    stages = [(entry["stage"], entry["num_workers"]) for entry in run.of("trial_resize")]
    assert stages == [("wanted", 2), ("done", 2), ("wanted", 1), ("done", 1)]
    assert run.status["dials"]["workers"]["changes_applied"] == 2
    assert run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
    steps = orchestrator.load_run(run.run_dir).steps.to_pandas()
    first = steps[steps["rank"] == 0]
    assert [sorted(set(part)) for _, part in first.groupby("attempt")["num_workers"]] == [[1], [2], [1]]
    assert set(steps["micro_batch"] * steps["grad_accum"] * steps["num_workers"]) == {16}, "the global batch is kept"
    assert (first["cursor"] == range(0, 16 * len(first), 16)).all(), "every sample once, in order"
