"""How a run ends, as far as that needs no cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest

from orchestrator import beginning
from orchestrator import driver as run
from orchestrator.cluster import StartGivenUpError
from orchestrator.config import ResolvedRun, load_config
from orchestrator.errors import ConfigError, UnfitEnvironmentError
from orchestrator.output import hang_up


class Policy:
    """Answers one status after the other, and the last one for ever."""

    def __init__(self, *states: list[str]) -> None:
        self._states, self.num_asked = list(states), 0
        self.status = SimpleNamespace(remote=self._answer)

    def _answer(self) -> dict[str, Any]:
        self.num_asked += 1
        states = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return {"trials": [{"state": state} for state in states]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr(run, "_POLL_S", 0.0)


def test_a_trial_that_is_leaving_its_slot_when_the_search_is_over_is_waited_for() -> None:
    policy = Policy(["running", "stopped"], ["running", "stopped"], ["done", "stopped"])
    assert run._last_states(SimpleNamespace(policy=policy)) == ["done", "stopped"]  # type: ignore[arg-type]
    assert policy.num_asked == 3


def test_a_trial_that_never_leaves_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_LEAVE_S", 0.0)
    assert run._last_states(SimpleNamespace(policy=Policy(["running"]))) == ["running"]  # type: ignore[arg-type]


def resolved_run(storage: Path) -> ResolvedRun:
    (storage.parent / "run.yaml").write_text(f"name: one\nstorage: {storage}\njob: {{name: mlp}}\n")
    return load_config(storage.parent / "run.yaml", [])


def test_a_run_directory_that_cannot_be_made_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"storage: .* cannot be made \(Not a directory\); allowed: a directory"):
        beginning.make_run_dir(resolved_run(tmp_path / "file"))
    resolved = resolved_run(tmp_path / "runs")
    beginning.make_run_dir(resolved)
    with pytest.raises(ConfigError, match="exists already"):
        beginning.make_run_dir(resolved)


@pytest.mark.parametrize("trace", ["trials", "status"])
@pytest.mark.parametrize("journal", [None, ""])
def test_a_run_whose_journal_is_lost_does_not_begin_from_its_start(
    tmp_path: Path, trace: str, journal: str | None
) -> None:
    """It would train finished trials again, and mix their records with those that are there."""
    resolved = resolved_run(tmp_path / "runs")
    beginning.make_run_dir(resolved)
    if trace == "trials":
        (resolved.run_dir / "trials" / "trial-00000").mkdir(parents=True)
    else:
        status = {"state": "interrupted", "trials": [{"trial_id": "trial-00000"}]}
        (resolved.run_dir / "status.json").write_text(json.dumps(status))
    if journal is not None:
        (resolved.run_dir / "journal.jsonl").write_text(journal)
    with pytest.raises(ConfigError, match=r"journal\.jsonl is empty or gone although trials ran"):
        run.resume(resolved.run_dir)


def test_a_run_directory_that_lost_its_empty_folders_can_be_held(tmp_path: Path) -> None:
    with run.single_driver(tmp_path):
        assert (tmp_path / "control" / "lock").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_ray_starts_ends_the_run_with_its_own_exit_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    """It had left processes, a cluster without slots, or a core dump."""
    driver = run._Driver(resolved_run(tmp_path / "runs"), tmp_path)
    started = threading.Event()

    @contextlib.contextmanager
    def starting(is_unwanted: Callable[[], bool]) -> Iterator[None]:
        os.kill(os.getpid(), number)
        started.set()
        if is_unwanted():
            raise StartGivenUpError
        yield

    monkeypatch.setattr(driver._ray, "opened", starting)
    monkeypatch.setattr(run, "_load_torch", lambda: None)
    monkeypatch.setattr(run, "sweep", list)
    with driver.interrupts.taken():
        assert driver.execute(True) == code
    assert started.is_set()
    output = capsys.readouterr().out
    assert "ended before any trial began" in output
    assert output.splitlines()[-1] == str(tmp_path)
    assert not (tmp_path / "journal.jsonl").exists(), "a journal without a beginning could not be resumed"


def test_what_came_of_a_run_is_said_before_ray_has_ended_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of Ray takes seconds, in which a user would wait for the traceback."""
    driver = run._Driver(resolved_run(tmp_path / "runs"), tmp_path)
    trial = {"trial_id": "t0", "state": "failed", "error": "NameError: x"}
    said: list[str] = []

    @contextlib.contextmanager
    def opened(_is_unwanted: Callable[[], bool]) -> Iterator[None]:
        yield
        said.append(capsys.readouterr().out)

    def search() -> str:
        (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "trials": [trial]}))
        return "failed"

    monkeypatch.setattr(driver._ray, "opened", opened)
    monkeypatch.setattr(driver, "_search", search)
    for name, value in (
        ("_load_torch", lambda: None),
        ("sweep", list),
        ("cluster_leaks", dict),
        ("reinstall", lambda: None),
    ):
        monkeypatch.setattr(run, name, value)
    assert driver.execute(True) == 1
    assert "t0 failed: NameError: x" in said[0]
    assert said[0].splitlines()[-1] == str(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("states", "code", "last"),
    [
        (["done", "stopped"], 0, None),
        (["done", "failed", "failed"], 4, "2 of 3 trials failed; the report above says why"),
        (["failed"], 4, "1 of 1 trial failed; the report above says why"),
    ],
)
def test_a_run_in_which_trials_failed_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], states: list[str], code: int, last: str | None
) -> None:
    driver = run._Driver(resolved_run(tmp_path / "runs"), tmp_path)
    status = {"state": "done", "trials": [{"trial_id": f"t{n}", "state": state} for n, state in enumerate(states)]}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert driver._last_word("done", {}) == code
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(tmp_path), "scripts take it"
    assert printed.err.splitlines() == ([] if last is None else [last])


@pytest.mark.parametrize(("state", "code"), [("failed", 1), ("interrupted", 130)])
def test_a_run_that_its_policy_actor_could_not_end_is_ended_by_its_driver(
    tmp_path: Path, state: str, code: int
) -> None:
    """After a death of Ray its status had said `running` for ever."""
    driver = run._Driver(resolved_run(tmp_path / "runs"), tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "trials": []}))
    (tmp_path / "journal.jsonl").write_text("")
    assert driver._last_word(state, {"processes": 0}) == code
    assert json.loads((tmp_path / "status.json").read_text())["state"] == state
    assert json.loads((tmp_path / "journal.jsonl").read_text())["state"] == state
    assert driver._last_word("failed", {}) == 1, "a second last word is not said"
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1


def test_a_run_file_that_was_edited_is_said_and_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = resolved_run(tmp_path / "runs")
    beginning.make_run_dir(resolved)
    assert beginning.load_begun(resolved.run_dir).config == resolved.config
    assert capsys.readouterr().out == ""
    edited = resolved.run_dir / "run.yaml"
    edited.write_text(edited.read_text().replace("seed: 0", "seed: 7"))
    assert beginning.load_begun(resolved.run_dir).config.seed == 0
    said = capsys.readouterr().out
    assert f"{edited} was edited since the run began; what counts is what it began with" in said
    assert "--set name=NEW" in said
    edited.unlink()
    assert beginning.load_begun(resolved.run_dir).config.seed == 0


def test_a_run_of_an_earlier_version_goes_on_with_the_run_file_it_has(tmp_path: Path) -> None:
    resolved = resolved_run(tmp_path / "runs")
    beginning.make_run_dir(resolved)
    (resolved.run_dir / "control" / "run.yaml").unlink()
    (resolved.run_dir / "run.yaml").write_text(resolved.to_yaml().replace("seed: 0", "seed: 7"))
    assert beginning.load_begun(resolved.run_dir).config.seed == 7


def test_a_run_file_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    resolved = resolved_run(tmp_path / "runs")
    beginning.make_run_dir(resolved)
    begun = resolved.run_dir / "control" / "run.yaml"
    begun.write_text(begun.read_text().replace("# schema: 1", "# schema: 99"))
    with pytest.raises(ConfigError, match=r"control/run.yaml:1: was written by a newer version \(schema 99\); allowed"):
        beginning.load_begun(resolved.run_dir)


def test_a_quota_of_the_container_counts_as_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolved_run(tmp_path / "runs")
    monkeypatch.setattr(beginning, "num_usable_cores", lambda: len(os.sched_getaffinity(0)))
    assert beginning.within_quota(resolved) is resolved
    monkeypatch.setattr(beginning, "num_usable_cores", lambda: 1)
    if len(os.sched_getaffinity(0)) > 1:
        assert beginning.within_quota(resolved).config.cluster.num_cpus == 1
    assert resolved.config.cluster.num_cpus is None, "the run file says nothing of it"


def test_the_last_resort_ends_everything_and_leaves_a_run_that_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = run._Driver(resolved_run(tmp_path / "runs"), tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopping", "trials": []}))
    (tmp_path / "journal.jsonl").write_text("")
    removed: list[Path] = []

    def remove(home: Path) -> int:
        removed.append(home)
        return 0

    monkeypatch.setattr(run, "remove_home", remove)
    driver._ray.home = tmp_path / "home"
    thawed: list[bool] = []
    driver._thaw = lambda: thawed.append(True)
    driver.interrupts.note(signal.SIGTERM)
    assert driver._end_hard() == 143
    assert (removed, thawed) == ([tmp_path / "home"], [True])
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted"
    assert "did not end in time and was ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words", "is_stuck"),
    [
        (UnfitEnvironmentError("a process of Ray ended"), 3, "error: a process of Ray ended", True),
        (ConfigError("another process runs it"), 2, "error: another process runs it", False),
        (KeyError("ours"), 1, "please report it", False),
    ],
)
def test_an_error_is_said_where_output_lasts_and_a_stuck_ray_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str, is_stuck: bool
) -> None:
    resolved, left = resolved_run(tmp_path / "runs"), []

    def fail(driver: run._Driver, _plain: bool | None) -> int:
        driver.is_stuck = is_stuck
        hang_up()  # what is said goes to the log of the run
        raise error

    monkeypatch.setattr(run._Driver, "execute", fail)
    monkeypatch.setattr(run._Driver, "leave", lambda _driver, code: left.append(code))
    with open_streams(monkeypatch):
        assert run._drive(resolved, tmp_path, plain=True) == code
    assert left == ([code] if is_stuck else [])
    assert words in (tmp_path / "run.log").read_text()


@contextlib.contextmanager
def open_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard streams with descriptors, which those of pytest may lack."""
    with Path(os.devnull).open("w") as out, Path(os.devnull).open("w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        handler = logging.StreamHandler(cast(TextIO, _Current()))
        logging.getLogger("orchestrator").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("orchestrator").removeHandler(handler)


class _Current:
    """What standard error is at the time, as Python's handler of last resort has it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def test_a_quiet_run_prints_its_directory_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(_driver: run._Driver, _plain: bool | None) -> int:
        print("a table")  # noqa: T201 - stands for the view
        return 0

    monkeypatch.setattr(run._Driver, "execute", execute)
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert run._drive(resolved_run(tmp_path / "runs"), tmp_path, plain=True, is_quiet=True) == 0
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n"
    assert (tmp_path / "err").read_text() == ""


class Choosy:
    """A policy of the user's own."""

    def __init__(self, patience_s: float = 1.0) -> None:
        if patience_s < 0:
            raise ValueError("patience_s is negative")

    def decide(self, snapshot: object) -> object:
        """Nothing."""
        raise NotImplementedError


@pytest.mark.parametrize(
    ("params", "words"),
    [("{patience_s: '5'}", "'<' not supported"), ("{patience_s: -1}", "is negative"), ("{x: 1}", "no parameter 'x'")],
)
def test_a_policy_of_the_users_own_is_built_before_anything_starts(tmp_path: Path, params: str, words: str) -> None:
    """Its refusal had come out of the policy actor, behind Ray's start, as a traceback of Ray."""
    file = tmp_path / "run.yaml"
    text = f"name: one\nstorage: {tmp_path}/runs\njob: {{name: mlp}}\n"
    file.write_text(f"{text}policy: {{name: '{__name__}:Choosy', params: {params}}}\n")
    with pytest.raises(ConfigError, match=words) as caught:
        run.start(load_config(file, []))
    assert (caught.value.line, caught.value.key) == (4, "policy")
    assert not (tmp_path / "runs").exists()
    file.write_text(f"{text}policy: {{name: '{__name__}:Choosy', params: {{patience_s: 2}}}}\n")
    beginning.require_policy(load_config(file, []))
