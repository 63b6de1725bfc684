"""Steering from outside: what is checked before it is sent, how it is answered, and what programs are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import requests, steer
from orchestrator.api import Run
from orchestrator.cli import main
from orchestrator.errors import ConfigError, RequestError
from orchestrator.requests import Request

RUN = """\
# schema: 1
name: r
job: {name: mlp, params: {depth: 2}}
search: {space: {lr: {loguniform: [1.0e-3, 1.0e-2]}, width: {choice: [16, 32]}}, num_trials: 6, max_concurrent: 2}
"""


def status_of(run_dir: Path, **changes: Any) -> None:
    trials = [{"trial_id": "trial-00000", "state": "running", "metric_value": None, "params": {"lr": 0.01}}]
    status = {"schema": 1, "state": "running", "metric": "val_loss", "mode": "min", "trials": trials}
    (run_dir / "status.json").write_text(json.dumps(status | changes))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "r"
    (path / "control").mkdir(parents=True)
    for place in (path / "run.yaml", path / "control" / "run.yaml"):
        place.write_text(RUN)
    status_of(path)
    return path


@pytest.fixture
def asked(run_dir: Path) -> Iterator[list[Request]]:
    """An actor that does everything; what it was asked."""
    found: list[Request] = []
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.wait(0.01):
            for request in requests.pending(run_dir):
                found.append(request)
                requests.answer(run_dir, request, {"command": request.command, "trial_id": request.trial_id or "new"})

    thread = threading.Thread(target=serve)
    thread.start()
    yield found
    is_over.set()
    thread.join()


def call(run_dir: Path, *arguments: str) -> int:
    command, *rest = arguments
    return main([command, str(run_dir), *rest])


def test_a_request_is_answered_and_says_who_asked(
    run_dir: Path, asked: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run_dir, "add", "--set", "lr=0.5", "--set", "width=32", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["command"], answer["trial_id"]) == (1, "add", "new")
    (request,) = asked
    assert request.values == {"lr": 0.5, "width": 32}
    assert "@" in request.by
    assert answer["request_id"] == request.request_id
    assert requests.pending(run_dir) == []


def test_a_request_under_the_same_id_is_sent_once(run_dir: Path, asked: list[Request]) -> None:
    for _ in range(2):
        assert call(run_dir, "pause", "--trial", "trial-00000", "--request-id", "mine") == 0
    assert len(asked) == 1


def test_every_command_reaches_the_run(run_dir: Path, asked: list[Request]) -> None:
    assert call(run_dir, "clone", "--trial", "trial-00000", "--set", "lr=0.5") == 0
    assert call(run_dir, "stop", "--trial", "trial-00000", "--json") == 0
    assert call(run_dir, "resume", "--trial", "trial-00000") == 0
    assert call(run_dir, "set", "priority=2", "weight=3.0") == 0
    assert [request.command for request in asked] == ["clone", "stop", "resume", "set"]
    assert asked[-1].values == {"priority": 2, "weight": 3.0}


def test_the_same_from_python(run_dir: Path, asked: list[Request]) -> None:
    run = Run(run_dir)
    assert run.add(lr=0.5, width=16) == "new"
    assert run.clone("trial-00000", lr=0.5) == "trial-00000"
    run.pause("trial-00000")
    run.resume("trial-00000")
    run.stop("trial-00000")
    run.set("trial-00000", priority=1, deadline="2999-01-01T00:00+00:00")
    assert [request.command for request in asked] == ["add", "clone", "pause", "resume", "stop", "set"]
    assert asked[-1].values == {"priority": 1, "deadline": 32472144000.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "--set", "lr=0.5"], "no value for width"),
        (["add", "--set", "lr=0.5", "--set", "width=32", "--set", "wings=2"], "no parameter 'wings'"),
        (["add", "--set", "lr=fast", "--set", "width=32"], "lr"),
        (["clone", "--trial", "trial-00000", "--set", "a.b=1"], "allowed: name=value"),
        (["set", "priority=high"], "queue.priority"),
        (["set", "colour=red"], "allowed: user, priority, weight, deadline"),
        (["set", "--trial", "trial-00000", "user=anna"], "allowed: priority, weight"),
        (["set", "deadline=2020-01-01T00:00"], "ago; allowed: a moment to come"),
        (["wait", "--until", "soon"], "allowed: done, first-report"),
        (["logs", "--trial", "trial-00009"], "allowed: trial-00000"),
        (["pause", "--trial", "trial-00000", "--request-id", "../x"], "allowed: at most 64 letters"),
    ],
)
def test_a_mistake_is_one_message_and_an_object_for_programs(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(run_dir, *arguments, "--json") == 2
    seen = capsys.readouterr()
    assert words in seen.err
    problem = json.loads(seen.out)
    assert (problem["schema"], problem["error"]["code"]) == (1, "input")
    assert words in problem["error"]["message"]
    assert not run_dir.joinpath("control", "requests").exists(), "nothing was sent"


def test_a_refusal_of_the_run_has_a_code(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request(request_id="q", command="pause")
    requests.answer(run_dir, request, {"error": {"code": "no_trial", "message": "there is no trial 't9'"}})
    assert call(run_dir, "pause", "--trial", "t9", "--request-id", "q", "--json") == 2
    problem = json.loads(capsys.readouterr().out)
    assert problem["error"] == {"code": "no_trial", "message": "there is no trial 't9'"}


def test_a_run_that_ended_or_does_not_answer_says_so(run_dir: Path) -> None:
    with pytest.raises(RequestError, match="was taken back") as caught:
        steer.ask(run_dir, "pause", "trial-00000", timeout_s=0.0)
    assert caught.value.code == "timeout"
    assert requests.pending(run_dir) == []
    status_of(run_dir, state="done")
    with pytest.raises(RequestError, match="has ended") as caught:
        steer.ask(run_dir, "pause", "trial-00000")
    assert caught.value.code == "run_ended"


def test_what_is_no_request_is_removed(run_dir: Path) -> None:
    directory = run_dir / "control" / "requests"
    directory.mkdir()
    bad = {"a": "{", "b": "[]", "c": '{"request_id": "x", "command": "add"}', "d": '{"command": 1}'}
    for name, text in bad.items():
        (directory / f"{name}.json").write_text(text)
    assert requests.pending(run_dir) == []
    assert list(directory.iterdir()) == []


def test_waiting_ends_at_the_event_or_with_the_run(run_dir: Path) -> None:
    trial = {"trial_id": "trial-00000", "state": "running", "metric_value": 1.5}
    with pytest.raises(RequestError, match="not reached within"):
        steer.wait(run_dir, "first-report", 0.0)
    status_of(run_dir, trials=[trial, {**trial, "metric_value": 1.1}])
    assert steer.wait(run_dir, "first-report")["is_reached"]
    assert steer.wait(run_dir, "best<1.2") == {"is_reached": True, "state": "running", "best": 1.1}
    status_of(run_dir, state="interrupted", trials=[trial])
    assert not steer.wait(run_dir, "best<1.2")["is_reached"]
    assert call(run_dir, "wait") == 1
    status_of(run_dir, state="done", trials=[trial])
    assert call(run_dir, "wait") == 0


def test_the_end_of_a_log(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run_dir / "trials" / "trial-00000" / "log.txt"
    with pytest.raises(ConfigError, match="has written no log yet"):
        steer.log_of(run_dir, "trial-00000")
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\nthree\n")
    assert call(run_dir, "logs", "--trial", "trial-00000", "--lines", "2") == 0
    assert capsys.readouterr().out == "two\nthree\n"
