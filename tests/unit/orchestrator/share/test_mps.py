"""MPS on a machine with a control program made for the test: started, found, and stopped whoever dies."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.errors import ShareError
from orchestrator.share.mps import CONTROL, OwnMps, find_running

PIPE = "CUDA_MPS_PIPE_DIRECTORY"
WORKING = """#!/bin/sh
if [ "$1" = "-d" ]; then touch "$CUDA_MPS_PIPE_DIRECTORY/control"; exit 0; fi
read line
case "$line" in
  get_default*) echo "100.0";;
  quit*) echo "$line" >> "$(dirname "$0")/quits";;
esac
"""
REFUSING = """#!/bin/sh
echo "An instance of this daemon is already running" >&2
exit 1
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv(PIPE, raising=False)
    return folder / CONTROL


def write(program: Path, text: str) -> None:
    program.write_text(text)
    program.chmod(0o755)


def wait_until_gone(path: Path) -> bool:
    deadline_s = time.monotonic() + 10
    while path.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not path.exists()


def test_an_own_daemon_answers_and_ends_with_its_starter(program: Path, tmp_path: Path) -> None:
    write(program, WORKING)
    own = OwnMps(tmp_path / "mps")
    found = own.start()
    directory = Path(found.environment[PIPE])
    assert found.is_own
    assert find_running(found.environment) is not None
    own.stop()  # closes a pipe, as the end of the process would, by whatever signal
    own.stop()
    assert wait_until_gone(directory)
    assert (program.parent / "quits").read_text() == "quit -t 5\n"


def test_no_program_is_said(program: Path, tmp_path: Path) -> None:
    with pytest.raises(ShareError, match=f"no {CONTROL} on the PATH"):
        OwnMps(tmp_path / "mps").start()


def test_a_daemon_that_refuses_is_quoted_and_leaves_nothing(program: Path, tmp_path: Path) -> None:
    write(program, REFUSING)
    with pytest.raises(ShareError, match="MPS does not start: An instance of this daemon is already running"):
        OwnMps(tmp_path / "mps").start()
    assert wait_until_gone(tmp_path / "mps")


def answers(text: str) -> object:
    def ask(line: str, environment: Mapping[str, str]) -> str:
        if text == "hangs":
            raise subprocess.TimeoutExpired(CONTROL, 5)
        return text

    return ask


@pytest.mark.parametrize(
    ("text", "extra", "limits"),
    [
        ("100.0", {}, ""),
        ("25.0", {}, "25 % of the SMs per process"),
        ("100.0", {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10"}, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=10"),
    ],
)
def test_a_running_daemon_is_used_with_its_limits_named(
    tmp_path: Path, text: str, extra: dict[str, str], limits: str
) -> None:
    (tmp_path / "control").touch()
    found = find_running({PIPE: str(tmp_path), **extra}, answers(text))  # type: ignore[arg-type]
    assert found is not None
    assert (found.is_own, found.limits, found.environment) == (False, limits, {PIPE: str(tmp_path)})


def test_a_daemon_that_does_not_answer_is_none(tmp_path: Path) -> None:
    assert find_running({PIPE: str(tmp_path)}) is None
    (tmp_path / "control").touch()
    assert find_running({PIPE: str(tmp_path)}, answers("hangs")) is None  # type: ignore[arg-type]
