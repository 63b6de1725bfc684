"""How real runs end when signals, closed output or a killed driver come in between, and what they leave to others."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.processes import still_there, with_environment
from tests.integration.runs import call, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENDS_WITHIN_S = 15.0
SLOWER_WHEN_BUSY = 4.0
"""Test machines run several things at once; a run alone takes about 8 s."""


def tree_of(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def left_of(tmp_path: Path) -> list[str]:
    """The commands of a run's processes that are there when all should have ended."""
    left = still_there(with_environment("ENDING_TEST", tmp_path.name), ENDS_WITHIN_S)
    return [f"{pid} {psutil.Process(pid).name()} {' '.join(psutil.Process(pid).cmdline()).strip()}" for pid in left]


def test_sigterm_to_the_whole_group_while_slots_open_leaves_nothing_and_the_run_can_begin(tmp_path: Path) -> None:
    """Ray was ended first, and the run stood still for a minute."""
    mark = {"ENDING_TEST": tmp_path.name}
    file = run_file(tmp_path / "run.yaml", trial={"samples_per_report": 640, "max_reports": 1})
    run = start("run", str(file), run_dir=tmp_path / "runs" / "r", environment=mark)
    run.wait_until(lambda: run.of("node"), "Ray and the policy actor are there")
    assert not run.of("result")
    os.killpg(run.process.pid, signal.SIGTERM)
    began_s = time.monotonic()
    code, output = run.end()
    assert time.monotonic() - began_s < ENDS_WITHIN_S * SLOWER_WHEN_BUSY
    assert code == 143, output
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1] == str(run.run_dir)
    assert left_of(tmp_path) == []
    assert run.status["state"] == "interrupted"
    assert run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
    code, output = start("resume", str(run.run_dir), run_dir=run.run_dir).end()
    assert code == 0, output
    assert len(results(run.run_dir)) == 3


def test_a_run_goes_on_without_its_terminal_and_is_seen_by_nobody_else(tmp_path: Path) -> None:
    """Output that closes, a terminal that hangs up, a proxy in the way; ports on loopback, no token in the home."""
    surroundings = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": "", "http_proxy": "http://127.0.0.1:9"}
    file = run_file(tmp_path / "run.yaml", trial={"samples_per_report": 6400, "max_reports": 2})
    run = start("run", str(file), run_dir=tmp_path / "runs" / "r", environment=surroundings)
    assert run.process.stdout is not None
    run.process.stdout.close()  # as `| head -1` does
    run.wait_until(lambda: len(run.of("result")) >= 1, "a report")
    os.killpg(run.process.pid, signal.SIGHUP)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in tree_of(run.process.pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}, listening
    assert listening, "nothing was looked at"
    assert run.process.wait(300) == 0
    assert run.status["state"] == "done"
    assert (run.run_dir / "run.log").read_text().splitlines()[-1] == str(run.run_dir)
    assert not (tmp_path / ".ray").exists()
    answer = call("verify", str(run.run_dir), "--checkpoints", "--json")
    assert json.loads(answer.stdout)["violations"] == []


def test_what_a_killed_driver_leaves_is_found_and_removed(tmp_path: Path) -> None:
    mark = {"ENDING_TEST": tmp_path.name}
    run = start("run", str(run_file(tmp_path / "run.yaml")), run_dir=tmp_path / "runs" / "r", environment=mark)
    run.wait_until(lambda: run.of("node"), "Ray and the policy actor are there")
    (home,) = {process.environ()["RAY_TMPDIR"] for process in tree_of(run.process.pid)[1:2]}
    run.process.kill()
    run.process.communicate()
    listed = json.loads(call("list", "--storage", str(run.run_dir.parent), "--json").stdout)
    assert [each["state"] for each in listed["runs"]] == ["lost"]
    shown = call("clean")
    assert f"would remove {home}" in shown.stdout
    assert Path(home).is_dir()
    removed = call("clean", "--yes")
    assert f"removed {home}" in removed.stdout
    assert not Path(home).exists()
    assert left_of(tmp_path) == []
