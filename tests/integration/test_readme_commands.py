"""The README's commands, typed into a shell in a fresh directory, in its order; its Python at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.control.journal import FILE_NAME, read
from tests.unit.test_readme import README, ROOT, blocks, rows, section

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WAIT_S = 120.0
LONGER = "--set trial.samples_per_report=120000"
"""The README's run ends within seconds; this keeps it going until it has been stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """A directory with the repository's run files in it, and a shell that finds `orchestrator`."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def begin(self, line: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a line and let it go on."""
        with log.open("wb") as out:
            return subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.directory,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def walkthrough() -> list[str]:
    """The lines of the quick start."""
    return [line for block in blocks(README, "bash") for line in block.splitlines() if line.strip()]


def example(command: str) -> str:
    """The example of a command in the README's table."""
    table = rows(section(README, "Commands").partition("Ctrl-C")[0])
    return next(row[1].strip("`") for row in table if row[0] == f"`{command}`")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a run that a failed test left behind, with all its processes."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
    process.wait()


def wait_until(is_so: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {WAIT_S:g} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    directory = tmp_path_factory.mktemp("readme")
    for file in ROOT.glob("*.yaml"):
        shutil.copy(file, directory)
    return Shell(directory=directory)


@pytest.fixture(scope="module")
def story(shell: Shell) -> Iterator[dict[str, Any]]:
    """The whole story of the README: init, check, dry run, run, stop, resume."""
    *before, run_line = walkthrough()
    told: dict[str, Any] = {line: shell.type(line) for line in before}
    told["log"] = log = shell.directory / "run.log"
    told["run_dir"] = run_dir = shell.directory / "runs" / "search"
    process = shell.begin(f"{run_line} {LONGER}", log)
    try:
        journal = run_dir / FILE_NAME
        wait_until(
            lambda: (
                process.poll() is not None
                or (journal.exists() and any(entry["kind"] == "result" for entry in read(journal)))
            ),
            "the first report",
        )
        told["stop"] = shell.type(example("stop"))
        told["code"] = process.wait(WAIT_S)
        told["resume"] = shell.type(example("resume"))
        yield told
    finally:
        kill(process)


def test_the_walkthrough_is_the_one_expected() -> None:
    assert [line.split()[1] for line in walkthrough()] == ["init", "check", "run", "run"]


def test_every_step_before_the_run_succeeds(story: dict[str, Any]) -> None:
    for line in walkthrough()[:-1]:
        assert story[line].returncode == 0, f"{line}\n{story[line].stderr}"


def test_the_run_is_stopped_and_says_how_it_goes_on(story: dict[str, Any]) -> None:
    assert story["stop"].returncode == 0, story["stop"].stderr
    assert "ended (interrupted)" in story["stop"].stdout
    assert story["code"] == 130, story["log"].read_text()
    assert "orchestrator resume" in story["stop"].stdout


def test_the_run_is_resumed_to_its_end(story: dict[str, Any]) -> None:
    assert story["resume"].returncode == 0, story["resume"].stderr
    assert json.loads((story["run_dir"] / "status.json").read_text())["state"] == "done"
    assert story["resume"].stdout.strip().splitlines()[-1] == str(story["run_dir"])


@pytest.mark.parametrize("command", ["list", "watch", "explain", "report", "verify"])
def test_a_command_on_a_run_succeeds(story: dict[str, Any], shell: Shell, command: str) -> None:
    done = shell.type(example(command))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_nothing_was_lost_on_the_way(story: dict[str, Any], shell: Shell) -> None:
    answer = json.loads(shell.type(example("verify")).stdout)
    assert answer["violations"] == []
    assert answer["checked"]["plans_replayed"] == answer["checked"]["plans"] > 0


def test_the_run_directory_holds_what_the_readme_says(story: dict[str, Any]) -> None:
    table = rows(section(README, "The run directory"))
    listed = {name.rstrip("/") for row in table for name in re.findall(r"`([^`]+)`", row[0])}
    assert {path.name for path in story["run_dir"].iterdir()} == listed - {"run.log"}  # its output was there to the end
    trial = next((story["run_dir"] / "trials").glob("trial-*"))
    assert {path.name for path in trial.iterdir()} == {"log.txt", "checkpoints"}
    assert 1 <= len(list((trial / "checkpoints").glob("step-*"))) <= 3


def test_the_python_of_the_readme_reads_the_run(story: dict[str, Any], shell: Shell) -> None:
    code = next(block for block in blocks(README, "python") if "load_run" in block)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.directory, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done ")
    assert "trial-00000" in done.stdout


@pytest.mark.parametrize("command", ["init", "check", "run", "doctor", "schema", "completion"])
def test_a_command_that_needs_no_run_succeeds(tmp_path: Path, command: str) -> None:
    shell = Shell(directory=tmp_path)
    if command in {"check", "run"}:
        assert shell.type(example("init")).returncode == 0
    line = example(command) + (" --dry-run" if command == "run" else "")
    done = shell.type(line)
    # A machine may lack something a run needs; to say so is what doctor is for.
    assert done.returncode in ({0, 3} if command == "doctor" else {0}), f"{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    if command == "schema":
        assert json.loads((tmp_path / line.rpartition("> ")[2]).read_text())["title"] == "RunConfig"
