"""Run directories from outside: found by name, listed with their state, asked to stop."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.clock import ManualClock
from orchestrator.errors import ConfigError
from orchestrator.processes import Owner
from orchestrator.run_dirs import StopKind, StopResult, find_run, list_runs, request_stop, state_of, wait_until_ended


def make_run(storage: Path, name: str, status: dict[str, Any] | str, updated_s: float = 1000.0) -> Path:
    run_dir = storage / name
    run_dir.mkdir(parents=True)
    text = status if isinstance(status, str) else json.dumps(status)
    (run_dir / "status.json").write_text(text, encoding="utf-8")
    os.utime(run_dir / "status.json", (updated_s, updated_s))
    return run_dir


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_runs_are_listed_newest_first_with_state_and_counts(tmp_path: Path) -> None:
    trials = [{"state": "running"}, {"state": "done"}, {"state": "stopped"}]
    make_run(tmp_path, "old", {"state": "done", "trials": trials}, updated_s=1000.0)
    make_run(tmp_path, "new", {"state": "running", "trials": {"a": {"state": "running"}}}, updated_s=2000.0)
    (tmp_path / "no-run").mkdir()
    runs = list_runs(tmp_path)
    assert [(r.name, r.state, r.num_trials, r.num_ended) for r in runs] == [
        ("new", "running", 1, 0),
        ("old", "done", 3, 2),
    ]


@pytest.mark.parametrize(
    "status", ["", "{", "[]", "\x00", "[" * 100_000, '{"state": 3, "trials": 7}', '{"trials": [1, null]}']
)
def test_a_damaged_status_is_listed_without_an_error(tmp_path: Path, status: str) -> None:
    make_run(tmp_path, "odd", status)
    assert [run.name for run in list_runs(tmp_path)] == ["odd"]


def test_a_state_cannot_carry_control_characters(tmp_path: Path) -> None:
    assert state_of(tmp_path, {"state": "\x1b[2Jx"}).isprintable()


def set_pid(run_dir: Path, text: object) -> None:
    (run_dir / "control").mkdir(exist_ok=True)
    (run_dir / "control" / "lock").write_text(str(text), encoding="utf-8")


def test_a_run_whose_driver_died_without_a_word_is_lost(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"})
    running = {"state": "running"}
    for alive in (os.getpid(), "", "x", "-1", "0", "9" * 30):
        set_pid(run_dir, alive)
        assert state_of(run_dir, running) == "running"
    set_pid(run_dir, dead_pid())
    assert state_of(run_dir, running) == "lost"
    assert state_of(run_dir, {"state": "done"}) == "done"


def test_a_lock_says_which_process_of_which_host_holds_it(tmp_path: Path) -> None:
    """A process id is given out again: such a run had been `running` for ever."""
    run_dir = make_run(tmp_path, "demo", {"state": "running"}, updated_s=4e9)
    owner = Owner.this()
    set_pid(run_dir, owner.record())
    assert state_of(run_dir, {"state": "running"}) == "running"
    set_pid(run_dir, dataclasses.replace(owner, start_ticks=owner.start_ticks - 1).record())
    assert state_of(run_dir, {"state": "running"}) == "lost"
    set_pid(run_dir, dataclasses.replace(owner, host="another", pid=dead_pid()).record())
    assert state_of(run_dir, {"state": "running"}) == "running", "another host's run is never judged"


def test_a_run_that_still_writes_its_status_is_not_lost(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"}, updated_s=4e9)
    set_pid(run_dir, dead_pid())
    assert state_of(run_dir, {"state": "running"}) == "running"


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"})
    assert find_run("demo", tmp_path) == run_dir.resolve()
    assert find_run(str(run_dir), tmp_path / "elsewhere") == run_dir.resolve()


def test_an_unknown_run_is_refused_with_the_one_probably_meant(tmp_path: Path) -> None:
    make_run(tmp_path, "demo", {"state": "running"})
    with pytest.raises(ConfigError, match="did you mean 'demo'") as caught:
        find_run("dmeo", tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "run", ["", ".", "..", "../x", "a/../../b", "/etc", "x\0y", "\x1b[31m", "x" * 5000, "/" + "y" * 5000]
)
def test_what_is_no_run_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_run(run, tmp_path)
    assert str(caught.value).isprintable()


def test_a_stop_request_says_which_kind_it_is(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"})
    request_stop(run_dir, StopKind.GRACEFUL)
    assert (run_dir / "control" / "stop").read_text(encoding="utf-8") == "graceful"
    request_stop(run_dir, StopKind.NOW)
    assert (run_dir / "control" / "stop").read_text(encoding="utf-8") == "now"
    assert [p.name for p in (run_dir / "control").iterdir()] == ["stop"]


def test_a_stop_request_is_not_written_through_a_link(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"})
    (tmp_path / "outside").mkdir()
    (run_dir / "control").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="symbolic link"):
        request_stop(run_dir, StopKind.NOW)
    assert list((tmp_path / "outside").iterdir()) == []


def test_waiting_ends_when_the_status_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"})
    clock = ManualClock()

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if clock.now_s() > 5:
            (run_dir / "status.json").write_text('{"state": "interrupted"}', encoding="utf-8")

    assert wait_until_ended(run_dir, 60, now_s=clock.now_s, sleep=sleep) is StopResult.ENDED
    assert 5 < clock.now_s() < 6


def test_waiting_gives_up_after_its_time_or_with_its_driver(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo", {"state": "running"})
    clock = ManualClock()
    assert wait_until_ended(run_dir, 3, now_s=clock.now_s, sleep=clock.advance) is StopResult.TIMED_OUT
    assert clock.now_s() == pytest.approx(3, abs=0.2)
    set_pid(run_dir, dead_pid())
    assert wait_until_ended(run_dir, 3, now_s=clock.now_s, sleep=clock.advance) is StopResult.DRIVER_GONE


def test_a_run_that_was_broken_off_before_its_first_status_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match=r"it has no status\.json"):
        find_run("new", tmp_path, may_be_new=True)
    (tmp_path / "new" / "run.yaml").write_text("")
    assert find_run("new", tmp_path, may_be_new=True) == tmp_path / "new"
    with pytest.raises(ConfigError, match=r"it has no status\.json"):
        find_run("new", tmp_path)
