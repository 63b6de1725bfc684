"""A run as a job of a running cluster with token authentication: submitted, stopped with checkpoints, resumed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.control.journal import read
from orchestrator.errors import ConfigError
from orchestrator.submit import STOP_WAIT_S, Packages, SubmittedRun, submit
from orchestrator.view.verify import verify
from tests.integration.heads import Head, ray_head
from tests.integration.runs import run_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WAIT_S = 180.0


@dataclass
class Story:
    """What happened to a run that was stopped as one job and resumed as another."""

    head: Head
    first: SubmittedRun
    lines: list[str]
    stop_s: float
    stopped: str
    at_stop: list[dict[str, Any]]
    commits: dict[str, bool]
    resumed: str
    output: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in entries(self.first.run_dir) if entry["kind"] == kind]


def entries(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "journal.jsonl"
    return list(read(path)) if path.exists() else []


def tell(head: Head, path: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(f"{head.dashboard}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("submitted")
    work = directory / "work"
    work.mkdir()
    run_file(work / "run.yaml", storage=str(directory / "runs"))
    with ray_head(num_cpus=2) as head, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        packages = Packages(working_dir=work, python=sys.executable)
        first = submit("run.yaml", packages, address=head.dashboard, metadata={"who": "a test"})
        deadline_s = time.monotonic() + WAIT_S
        while not any(entry["kind"] == "result" for entry in entries(first.run_dir)):
            assert first.status() in {"PENDING", "RUNNING"}, "\n".join(_log(first))
            assert time.monotonic() < deadline_s, "\n".join(_log(first))
            time.sleep(0.2)
        began_s = time.monotonic()
        stopped = first.stop()
        stop_s = time.monotonic() - began_s
        lines = _log(first)
        at_stop = entries(first.run_dir)
        left = [entry["checkpoint"] for entry in at_stop if entry["kind"] == "trial_requeued"]
        commits = {path: Path(path).is_dir() for path in left}
        resumed = _resume_by_command(head, first)
        outcome = "done" if resumed.returncode == 0 else "failed"
        yield Story(head, first, lines, stop_s, stopped, at_stop, commits, outcome, resumed.stdout + resumed.stderr)


def _log(run: SubmittedRun) -> list[str]:
    lines: list[str] = []
    if run.status() in {"STOPPED", "FAILED", "SUCCEEDED"}:
        run.follow(lines.append)
    return lines


def _resume_by_command(head: Head, run: SubmittedRun) -> subprocess.CompletedProcess[str]:
    """As a user types it; the command follows the job's log and ends with it."""
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}})
    ray = Path(sys.executable).parent / "ray"
    line = f"{ray} job submit --address {head.dashboard} --runtime-env-json {shlex.quote(environment)} --"
    line += f" {sys.executable} -m orchestrator resume {run.run_dir} --plain"
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=WAIT_S, check=False, env={**os.environ}
    )


def test_a_stopped_job_has_written_a_checkpoint_of_every_trial_in_time(story: Story) -> None:
    assert story.stopped == "STOPPED"
    assert story.stop_s < STOP_WAIT_S
    left = [entry for entry in story.at_stop if entry["kind"] == "trial_requeued"]
    assert left
    assert all("interrupted" in entry["reason"] for entry in left)
    assert story.commits
    assert all(story.commits.values())
    ended = [entry for entry in story.at_stop if entry["kind"] == "run_ended"]
    assert ended[-1]["state"] == "interrupted"


def test_it_is_resumed_as_a_new_job_without_losing_a_step(story: Story) -> None:
    assert story.resumed == "done", story.output
    found = verify(story.first.run_dir)
    assert found["violations"] == []
    assert [note for note in found["notes"] if "died with a worker" in note] == []
    steps = orchestrator.load_run(story.first.run_dir).steps.to_pandas()
    assert len(steps) == 3 * 9000, "no step was done twice"
    assert {entry["state"] for entry in story.of("trial_ended")} == {"done"}


def test_nothing_is_left_in_the_cluster(story: Story) -> None:
    for entry in story.of("run_ended"):
        assert entry["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}


def test_its_log_was_followed_and_its_metadata_kept(story: Story) -> None:
    assert any("checkpoint" in line for line in story.lines), story.lines
    assert story.first.metadata()["who"] == "a test"
    assert story.first.metadata()["orchestrator_run_dir"] == str(story.first.run_dir)


def test_without_the_token_the_cluster_answers_nobody(story: Story) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    assert tell(story.head, "/api/jobs/", {}) == 401
    assert tell(story.head, "/api/jobs/", {"Authorization": f"Bearer {token}"}) == 200


def test_a_relative_storage_is_refused(tmp_path: Path) -> None:
    run_file(tmp_path / "run.yaml", storage="runs")
    with pytest.raises(ConfigError, match="absolute path that all nodes share"):
        submit("run.yaml", Packages(working_dir=tmp_path), address="http://127.0.0.1:1")
