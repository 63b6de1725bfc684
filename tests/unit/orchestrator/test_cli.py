"""The commands and their exit codes. Whatever starts a run is replaced by a fake module."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from orchestrator import cli
from orchestrator.config import ResolvedRun, load_config
from orchestrator.errors import PlanError, UnfitEnvironmentError
from orchestrator.jobs.table import JOB_INFO
from orchestrator.processes import Owner
from tests.unit.orchestrator.control.test_repair import damage, stopped

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command line in an empty directory; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module of plain functions in the place of one that would import ray."""

    def install(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        for key, function in functions.items():
            setattr(module, key, function)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, child = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), child, module, raising=False)

    return install


def make_run(name: str, **status: Any) -> Path:
    run_dir = Path("runs") / name
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps({"state": "running", "trials": [], **status}), encoding="utf-8")
    return run_dir


def test_help_lists_every_command_with_its_summary() -> None:
    result = CliRunner().invoke(cli.orchestrator, ["--help"])
    assert result.exit_code == 0
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name} " in result.output
        assert summary in result.output


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli.orchestrator, [name, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"orchestrator {name}" in result.output


def test_an_unknown_command_is_the_users_mistake_with_a_suggestion(run: Run) -> None:
    code, out, err = run("chekc")
    assert (code, out) == (2, "")
    assert "did you mean 'check'?" in err


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "a", "b"), ("run", "--no-such", "f"), ("explain", "x", "--decision", "q")]
)
def test_wrong_arguments_are_the_users_mistake(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("job", list(JOB_INFO))
def test_init_writes_a_commented_file_that_is_valid_as_it_is(run: Run, job: str) -> None:
    code, out, _ = run("init", "my search.yaml", "--job", job)
    assert code == 0
    assert "orchestrator check" in out
    resolved = load_config(Path("my search.yaml"))
    assert (resolved.config.name, resolved.config.job.name) == ("my-search", job)
    assert "default" not in resolved.origins.values()
    assert set(resolved.config.search.space) == {"lr", "width"}


def test_init_never_overwrites(run: Run) -> None:
    Path("run.yaml").write_text("mine", encoding="utf-8")
    code, _, err = run("init")
    assert (code, Path("run.yaml").read_text(encoding="utf-8")) == (2, "mine")
    assert "exists already" in err


def test_init_into_a_missing_directory_or_for_an_unknown_job_is_a_users_mistake(run: Run) -> None:
    assert run("init", "no/such/dir.yaml")[0] == 2
    code, _, err = run("init", "x.yaml", "--job", "langage")
    assert code == 2
    assert "did you mean 'language'?" in err
    assert not Path("x.yaml").exists()


def test_check_prints_every_value_with_its_origin(run: Run) -> None:
    code, out, _ = run("check", str(ROOT / "demo.yaml"), "--set", "seed=3")
    assert code == 0
    assert [line.split() for line in out.splitlines() if line.startswith("seed")] == [["seed:", "3", "#", "--set"]]
    assert "valid; fits this machine" in out
    assert yaml.safe_load(out.rpartition("\n\n")[0])["search"]["num_trials"] == 6


def test_check_as_json_has_the_configuration_and_the_origins(run: Run) -> None:
    code, out, _ = run("check", str(ROOT / "demo.yaml"), "--json")
    answer = json.loads(out)
    assert (code, answer["valid"], answer["fits"], answer["problems"]) == (0, True, True, [])
    assert answer["config"]["name"] == "demo"
    assert answer["origins"]["name"].endswith("demo.yaml:4")


def test_check_of_a_wrong_file_is_exit_code_2_with_one_line_per_problem(run: Run) -> None:
    Path("bad.yaml").write_text("name: a\nsed: 1\njob: {name: mpl}\n", encoding="utf-8")
    code, out, err = run("check", "bad.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: bad.yaml:2: sed: unknown key 'sed'")
    code, out, err = run("check", "bad.yaml", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["valid"] is False


def test_check_says_when_a_valid_file_does_not_fit(run: Run) -> None:
    Path("runs/demo").mkdir(parents=True)
    code, out, err = run("check", str(ROOT / "demo.yaml"))
    assert code == 2
    assert out.startswith("name: demo")
    assert "exists already" in err
    code, out, _ = run("check", str(ROOT / "demo.yaml"), "--json")
    answer = json.loads(out)
    assert (code, answer["valid"], answer["fits"], len(answer["problems"])) == (2, True, False, 1)


def test_run_hands_the_resolved_configuration_over(run: Run, fake: Callable[..., None]) -> None:
    seen: list[tuple[ResolvedRun, bool | None, bool]] = []

    def start(resolved: ResolvedRun, *, plain: bool | None, is_quiet: bool) -> int:
        seen.append((resolved, plain, is_quiet))
        print("table")  # noqa: T201 - stands for the view
        return 0

    fake("orchestrator.driver", start=start)
    demo = str(ROOT / "demo.yaml")
    assert run("run", demo)[:2] == (0, "table\n")
    assert run("run", demo, "--plain", "--set", "name=b")[0] == 0
    assert run("run", demo, "--quiet")[0] == 0
    told = [(resolved.config.name, plain, is_quiet) for resolved, plain, is_quiet in seen]
    assert told == [("demo", None, False), ("b", True, False), ("demo", True, True)]


def test_a_wrong_file_starts_nothing_and_writes_nothing(run: Run, fake: Callable[..., None]) -> None:
    fake("orchestrator.driver", start=lambda *_, **__: pytest.fail("a run was started"))
    assert run("run", str(ROOT / "demo.yaml"), "--set", "search.num_trials=0")[0] == 2
    assert run("run", str(ROOT / "demo.yaml"), "--set", "name=../../x")[0] == 2
    assert list(Path.cwd().iterdir()) == []


def test_a_dry_run_starts_nothing_and_writes_nothing(run: Run, fake: Callable[..., None]) -> None:
    fake("orchestrator.driver", start=lambda *_, **__: pytest.fail("a run was started"))
    code, out, _ = run("run", str(ROOT / "demo.yaml"), "--dry-run")
    assert code == 0
    assert "6 trials, 2 at a time" in out
    assert str(Path("runs/demo").resolve()) in out
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UnfitEnvironmentError("no ports"), 3, "error: no ports"),
        (PlanError("bad plan"), 1, "error: bad plan"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_becomes_its_exit_code_without_a_traceback(
    run: Run, fake: Callable[..., None], error: BaseException, code: int, words: str
) -> None:
    def start(*_: object, **__: object) -> int:
        raise error

    fake("orchestrator.driver", start=start)
    seen, _, err = run("run", str(ROOT / "demo.yaml"))
    assert seen == code
    assert words in err
    assert "Traceback" not in err


def test_a_bug_is_logged_with_its_traceback_and_is_exit_code_1(
    run: Run, fake: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def start(*_: object, **__: object) -> int:
        raise ZeroDivisionError("a bug")

    fake("orchestrator.driver", start=start)
    assert run("run", str(ROOT / "demo.yaml"))[0] == 1
    assert "ZeroDivisionError: a bug" in caplog.text
    assert "Traceback" in caplog.text


def test_the_exit_code_of_a_run_is_passed_on(run: Run, fake: Callable[..., None]) -> None:
    fake("orchestrator.driver", start=lambda *_, **__: 130, resume=lambda *_, **__: 1)
    make_run("one")
    assert run("run", str(ROOT / "demo.yaml"))[0] == 130
    assert run("resume", "one")[0] == 1


def test_list_shows_runs_and_says_when_there_are_none(run: Run) -> None:
    assert "no runs" in run("list")[1]
    make_run("one", trials=[{"state": "done"}, {"state": "running"}])
    code, out, _ = run("list")
    assert code == 0
    assert out.splitlines()[1].split()[:3] == ["one", "running", "1/2"]
    answer = json.loads(run("list", "--json")[1])
    assert [(r["name"], r["state"]) for r in answer["runs"]] == [("one", "running")]


def test_list_of_a_missing_storage_is_the_users_mistake(run: Run) -> None:
    assert run("list", "--storage", "no-such")[0] == 2


@pytest.mark.parametrize("command", ["watch", "stop", "resume", "explain", "verify"])
def test_an_unknown_run_is_the_users_mistake_with_a_suggestion(run: Run, command: str) -> None:
    make_run("demo")
    code, out, err = run(command, "deom")
    assert (code, out) == (2, "")
    assert "did you mean 'demo'?" in err
    assert run(command, "../../etc")[0] == 2


def test_a_time_to_wait_that_is_no_number_is_a_users_mistake(run: Run) -> None:
    """Nothing is later than it: it would be waited for ever."""
    make_run("demo")
    code, _, err = run("stop", "demo", "--timeout-s", "nan")
    assert code == 2
    assert "--timeout-s is nan; allowed: a number" in err
    assert not (Path("runs") / "demo" / "control").exists(), "nobody was asked to stop"


def test_stop_writes_the_request_and_names_the_next_step(run: Run) -> None:
    run_dir = make_run("demo")
    code, out, _ = run("stop", "demo", "--no-wait")
    assert (code, out) == (0, "demo was asked to stop\n")
    assert (run_dir / "control" / "stop").read_text(encoding="utf-8") == "graceful"
    code, _, err = run("stop", "demo", "--now", "--timeout-s", "0")
    assert code == 1
    assert "has not ended within 0 s" in err
    assert (run_dir / "control" / "stop").read_text(encoding="utf-8") == "now"


def test_stop_of_an_ended_run_asks_for_nothing(run: Run) -> None:
    run_dir = make_run("demo", state="done")
    assert run("stop", "demo")[:2] == (0, "demo has ended already (done)\n")
    assert not (run_dir / "control").exists()


def test_watch_explain_and_verify_call_the_views(run: Run, fake: Callable[..., None]) -> None:
    calls: list[tuple[object, ...]] = []
    answer = {"generation": 7, "reason": "because"}
    fake("orchestrator.view.terminal", watch=lambda run_dir, once: calls.append((run_dir.name, once)))
    fake(
        "orchestrator.view.explain", explain=lambda _, n: {**answer, "asked": n}, render=lambda a: f"why: {a['reason']}"
    )
    make_run("demo")
    assert run("watch", "demo", "--once")[0] == 0
    assert calls == [("demo", True)]
    assert run("explain", "demo")[:2] == (0, "why: because\n")
    assert json.loads(run("explain", "demo", "--decision", "7", "--json")[1]) == {**answer, "asked": 7}
    assert run("explain", "demo", "--decision", "-1")[0] == 2


def test_verify_fails_when_it_finds_something(run: Run, fake: Callable[..., None]) -> None:
    found: list[dict[str, object]] = []
    notes: list[str] = []
    asked: list[bool] = []

    def verify(_: Path, *, reads_checkpoints: bool) -> dict[str, object]:
        asked.append(reads_checkpoints)
        return {"violations": list(found), "notes": list(notes)}

    fake("orchestrator.view.verify", verify=verify)
    make_run("demo")
    assert run("verify", "demo")[:2] == (0, "demo: no violations\n")
    found.append({"code": "leak", "text": "2 actors\x1b[2J are left", "trial_id": None, "generation": 3})
    code, out, _ = run("verify", "demo", "--checkpoints")
    assert (code, out) == (1, "violation: 2 actors\\x1b[2J are left (plan 3) [leak]\ndemo: 1 violation\n")
    assert asked == [False, True]
    code, out, _ = run("verify", "demo", "--json")
    assert (code, json.loads(out)) == (1, {"violations": found, "notes": notes})
    found.clear()
    notes.append("share of t0 under plan 3 not real")
    assert run("verify", "demo")[:2] == (0, "note: share of t0 under plan 3 not real\ndemo: no violations\n")


def test_doctor_answers_with_name_status_and_remedy(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    checks = json.loads(out)["checks"]
    assert all({"name", "status", "remedy"} <= set(check) for check in checks)
    assert code == (3 if any(check["status"] == "fail" for check in checks) else 0)
    assert len(run("doctor")[1].splitlines()) >= len(checks)


def test_schema_describes_the_run_file(run: Run) -> None:
    schema = json.loads(run("schema")[1])
    assert set(schema["required"]) == {"name", "job"}
    assert schema["additionalProperties"] is False
    assert {"search", "trial", "dials"} < set(schema["properties"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_calls_this_command(run: Run, shell: str) -> None:
    code, out, _ = run("completion", shell)
    assert code == 0
    assert "_ORCHESTRATOR_COMPLETE" in out


def test_completion_knows_commands_and_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("demo")
    monkeypatch.setenv("_ORCHESTRATOR_COMPLETE", "bash_complete")
    for words, expected in (("orchestrator ch", "check"), ("orchestrator watch de", "demo")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


def test_clean_touches_nothing_until_it_is_told_to(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, other = tmp_path / "orch-dead", tmp_path / "orch-other"
    for place, owner in ((dead, Owner.this()), (other, dataclasses.replace(Owner.this(), host="another"))):
        place.mkdir()
        (place / "owner.json").write_text(dataclasses.replace(owner, start_ticks=1).record(run_dir="/runs/r"))
    monkeypatch.setattr("orchestrator.leftovers.temporary_places", lambda: [tmp_path])
    code, out, _ = run("clean")
    assert code == 0
    assert f"would remove {dead} of /runs/r: its driver is dead" in out
    assert f"left alone: {other}" in out
    assert "orchestrator clean --yes" in out
    assert dead.exists()
    answer = json.loads(run("clean", "--json")[1])
    assert {Path(item["directory"]).name: item["life"] for item in answer["leftovers"]} == {
        "orch-dead": "dead",
        "orch-other": "unknown",
    }
    code, out, _ = run("clean", "--yes")
    assert f"removed {dead}" in out
    assert (dead.exists(), other.exists()) == (False, True)
    assert "nothing to remove" in run("clean")[1]


@pytest.mark.parametrize("errno_", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_what_the_machine_refuses_is_one_line(run: Run, fake: Callable[..., None], errno_: int) -> None:
    def start(*_: object, **__: object) -> int:
        raise OSError(errno_, os.strerror(errno_), "/runs/x")

    fake("orchestrator.driver", start=start)
    code, _, err = run("run", str(ROOT / "demo.yaml"))
    assert code == 3
    assert err.startswith(f"error: /runs/x: {os.strerror(errno_)}")
    assert len(err.splitlines()) == 1


def test_sigterm_ends_any_command_with_its_own_exit_code(run: Run, fake: Callable[..., None]) -> None:
    def start(*_: object, **__: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    fake("orchestrator.driver", start=start)
    code, _, err = run("run", str(ROOT / "demo.yaml"))
    assert (code, err) == (143, "terminated\n")


def test_repair_says_what_it_kept_and_how_to_go_on(run: Run, tmp_path: Path) -> None:
    world = stopped(tmp_path / "runs" / "r")
    (world.run_dir / "status.json").write_text('{"state": "interrupted"}')
    damage(world.run_dir, "ack")
    code, out, _ = run("repair", str(world.run_dir))
    assert code == 0
    assert "damaged: line" in out
    assert "entries kept" in out
    assert f"orchestrator resume {world.run_dir}" in out
    assert json.loads(run("repair", str(world.run_dir), "--json")[1])["damage"] == []
    (world.run_dir / "status.json").write_text('{"state": "running"}')
    assert run("repair", str(world.run_dir))[0] == 2
