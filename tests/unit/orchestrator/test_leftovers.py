"""What killed runs leave on a host: found, and removed where its owner is provably dead."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import leftovers
from orchestrator.processes import Life, Owner


def home(place: Path, name: str, **changes: object) -> Path:
    made = place / f"orch-{name}"
    (made / "ray").mkdir(parents=True)
    owner = dataclasses.replace(Owner.this(), **changes)  # type: ignore[arg-type]
    (made / "owner.json").write_text(owner.record(run_dir=f"/runs/{name}"))
    return made


def test_only_what_belongs_to_a_dead_process_of_this_host_is_removed(tmp_path: Path) -> None:
    alive, dead = home(tmp_path, "alive"), home(tmp_path, "dead", start_ticks=1)
    other = home(tmp_path, "other", host="another", start_ticks=1)
    (tmp_path / "orch-nobody").mkdir()
    (tmp_path / "orch-file").write_text("")
    (tmp_path / "orch-link").symlink_to(dead)
    found = {item.directory.name: item.life for item in leftovers.find([tmp_path])}
    assert found == {
        "orch-alive": Life.ALIVE,
        "orch-dead": Life.DEAD,
        "orch-other": Life.UNKNOWN,
        "orch-nobody": Life.UNKNOWN,
    }
    assert [item.run_dir for item in leftovers.sweep([tmp_path])] == ["/runs/dead"]
    assert not dead.exists()
    assert {path.name for path in tmp_path.glob("orch-[ano]*")} == {alive.name, other.name, "orch-nobody"}
    assert leftovers.sweep([tmp_path]) == []


def test_processes_of_a_dead_run_are_ended_with_its_directory(tmp_path: Path) -> None:
    dead = home(tmp_path, "dead", start_ticks=1)
    code = "import sys, time; print(flush=True); time.sleep(60)"
    environment = {**os.environ, "RAY_TMPDIR": str(dead)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (found,) = leftovers.find([tmp_path])
        assert found.pids == (process.pid,)
        assert str(found) == f"{dead} and 1 process of /runs/dead"
        leftovers.sweep([tmp_path])
        assert process.wait(timeout=10) == -9
    assert not dead.exists()


def test_an_agent_whose_title_covers_its_environment_is_found_by_its_log(tmp_path: Path) -> None:
    dead = home(tmp_path, "dead", start_ticks=1)
    with (dead / "ray" / "agent.out").open("w") as log:
        agent = subprocess.Popen(["ray::DashboardAgent", "60"], executable="sleep", stdout=log, env={})
        another = subprocess.Popen(["tail", "-f", "/dev/null"], stdout=log, env={})
    try:
        (found,) = leftovers.find([tmp_path])
        assert found.pids == (agent.pid,), "what else writes there may be the user's"
        leftovers.sweep([tmp_path])
        assert agent.wait(timeout=10) == -9
        assert another.poll() is None
    finally:
        for process in (agent, another):
            process.kill()
            process.wait()


def test_a_new_directory_is_marked_as_this_process_and_this_user_only() -> None:
    made = leftovers.make_home(Path("/runs/new"))
    try:
        (found,) = [item for item in leftovers.find() if item.directory == made]
        assert (found.life, found.run_dir) == (Life.ALIVE, "/runs/new")
        assert made.stat().st_mode & 0o077 == 0
    finally:
        assert leftovers.remove_home(made) == 0
    assert not made.exists()


def test_a_place_that_cannot_be_listed_holds_nothing(tmp_path: Path) -> None:
    assert leftovers.find([tmp_path / "missing"]) == []


def test_a_process_that_another_starts_while_it_is_ended_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, looks = home(tmp_path, "dead", start_ticks=1), [{1}, {2}, set()]
    killed: list[set[int]] = []
    monkeypatch.setattr(leftovers, "processes_of", lambda _home: looks.pop(0))
    monkeypatch.setattr(leftovers, "kill", killed.append)
    monkeypatch.setattr(leftovers, "still_there", lambda _pids, _timeout_s: set())
    assert leftovers.remove_home(dead) == 0
    assert killed == [{1}, {2}]
    assert not dead.exists()
