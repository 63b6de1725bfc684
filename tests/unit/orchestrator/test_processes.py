"""Who owns something on this host, and whether that process lives: by host, boot, namespace, process and its start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from orchestrator.processes import Life, Owner, descendants, kill, start_ticks, still_there, with_environment

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_an_owner_is_read_back_as_it_was_written() -> None:
    owner = Owner.this()
    assert Owner.parse(owner.record(run_dir="/runs/one")) == owner
    assert owner.pid == os.getpid()
    assert owner.life is Life.ALIVE


@pytest.mark.parametrize("text", ["", "7", "[]", "{", '{"pid": "x"}', '{"pid": 1}', "[" * 10_000, "\0", "null"])
def test_a_text_that_is_no_record_names_no_owner(text: str) -> None:
    assert Owner.parse(text) is None


def test_a_process_that_ended_is_dead_also_while_nobody_has_asked_for_its_exit_code() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    owner = dataclasses.replace(Owner.this(), pid=process.pid, start_ticks=start_ticks(process.pid) or 1)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert owner.life is Life.DEAD
    process.wait()
    assert owner.life is Life.DEAD


def test_a_process_id_that_was_given_out_again_is_another_process() -> None:
    owner = dataclasses.replace(Owner.this(), start_ticks=Owner.this().start_ticks - 1)
    assert owner.life is Life.DEAD


@pytest.mark.parametrize("field", ["host", "machine_id", "pid_namespace"])
def test_the_process_of_another_host_or_container_is_never_judged(field: str) -> None:
    record = json.loads(Owner.this().record()) | {"pid": 2**22 + 1, field: "another"}
    owner = Owner.parse(json.dumps(record))
    assert owner is not None
    assert owner.life is Life.UNKNOWN


def test_no_process_outlives_a_boot_of_its_host() -> None:
    owner = dataclasses.replace(Owner.this(), boot_id="earlier")
    assert owner.life is (Life.DEAD if owner.machine_id else Life.UNKNOWN)
    assert dataclasses.replace(owner, host="another").life is Life.UNKNOWN


def test_a_command_with_brackets_and_spaces_in_its_name_does_not_confuse(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    name = tmp_path_factory.mktemp("odd") / "a) R 1 (b"
    name.symlink_to("/bin/sleep")
    with subprocess.Popen([str(name), "60"]) as process:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        assert abs(ticks - Owner.this().start_ticks) < 100_000_000
        assert process.pid in descendants()
        process.kill()


def test_processes_are_known_by_their_environment_and_ended() -> None:
    with subprocess.Popen(SLEEP, env={**os.environ, "TEST_MARK": f"m-{os.getpid()}"}) as process:
        deadline_s = time.monotonic() + 10
        while not (found := with_environment("TEST_MARK", f"m-{os.getpid()}")) and time.monotonic() < deadline_s:
            pass  # the child has this environment once it has begun its program
        assert found == {process.pid}
        assert still_there(found, 0.0) == found
        kill(found)
        assert still_there(found, 10.0) == set()
