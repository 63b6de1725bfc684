"""Run directories from outside: found by name, listed with their state, asked to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import run_dirs
from orchestrator.clock import ManualClock
from orchestrator.control import status
from orchestrator.errors import ConfigError
from orchestrator.processes import Owner
from orchestrator.run_dirs import (
    StopKind,
    StopResult,
    find_run,
    list_runs,
    request_stop,
    run_file_schema,
    state_of,
    wait_until_ended,
    with_schema,
)


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


@contextlib.contextmanager
def as_nobody(*closed: Path) -> Iterator[None]:
    """As a user who may not read these files: root gives its rights away, others take them from the files."""
    modes = [(path, path.stat().st_mode) for path in closed]
    for path in closed:
        path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in modes:
            path.chmod(mode)


@pytest.fixture
def storage() -> Iterator[Path]:
    """One that everybody may look into; pytest's own directories are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("closed", ["", "status.json"], ids=["directory", "status"])
def test_another_users_run_hides_nobodys_own_and_is_no_traceback(storage: Path, closed: str) -> None:
    """The run directories of others are closed; where several users share a storage, `list` had shown nothing."""
    make_run(storage, "mine", {"state": "done"})
    other = make_run(storage, "other", {"state": "running"})
    for path in (storage / "mine", storage / "mine" / "status.json"):
        path.chmod(0o755)
    with as_nobody(other / closed):
        assert {run.name: run.state for run in list_runs(storage)} == {"mine": "done", "other": "unreadable"}
        assert find_run("mine", storage) == (storage / "mine").resolve()
        for name in ("other", str(other)):
            with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied; it belongs to \w+\); allowed"):
                find_run(name, storage)


@pytest.mark.parametrize("may_be_new", [False, True])
def test_a_run_of_a_newer_version_is_refused_by_name(tmp_path: Path, may_be_new: bool) -> None:
    make_run(tmp_path, "demo", {"schema": 99, "state": "done"})
    with pytest.raises(ConfigError, match=r"written by a newer version \(schema 99\); this one reads up to schema 1"):
        find_run("demo", tmp_path, may_be_new=may_be_new)
    assert [run.state for run in list_runs(tmp_path)] == ["newer"]


def test_the_schema_is_that_of_the_writer() -> None:
    assert run_dirs.SCHEMA == status.SCHEMA_VERSION
    assert run_file_schema(with_schema("name: a\n")) == run_dirs.SCHEMA
    assert run_file_schema("name: a\n# schema: 7\n") == 1, "only the first line says it"
    assert run_file_schema("# schema: 99\n") == 99


def test_the_status_of_a_search_with_very_many_trials_is_read(tmp_path: Path) -> None:
    """Those of 26,000 trials had been too long for the reader."""
    trials = [{"trial_id": f"trial-{number:05d}", "state": "done", "error": "x" * 700} for number in range(26_000)]
    make_run(tmp_path, "many", {"state": "done", "trials": trials})
    assert (tmp_path / "many" / "status.json").stat().st_size > 16 << 20
    (found,) = list_runs(tmp_path)
    assert (found.num_trials, found.num_ended) == (26_000, 26_000)
