"""The command `simulate` on workloads and on journals made here."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.control.journal import sealed
from orchestrator.policies import build_policy
from orchestrator.policies.plan import TrialId
from orchestrator.simulate.replay import replay
from tests.run_directory import RunDirectory, healthy_run
from tests.unit.orchestrator.control.worlds import World, spec
from tests.unit.policies.simulator.worlds import FirstFit

POLICY = "tests.unit.policies.simulator.worlds:FirstFit"
HEAD = "name,time,application,num_replicas,batch_size\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.csv").write_text(HEAD + "a,0,cifar10,2,256\nb,60,ncf,1,32768\nc,600,cifar10,4,512\n")

    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(("simulate", *arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


def journal_of(path: Path, policy: str = "goodput", num_rounds: int = 12) -> Path:
    """The journal of two trials that train under a real policy; returns the run directory."""
    world = World(path, policy)
    workers = []
    for index in range(2):
        world.controller.submit(TrialId(f"trial-{index:05d}"), {"lr": 0.1 * (index + 1)})
        workers.append(world.attach(f"slot-{index}"))
    for number in range(num_rounds):
        world.decide()
        for index, worker in enumerate(workers):
            worker.obey(num_steps=20, step_s=0.02 * (1 + index))
        world.clock.advance(3.0 if number % 3 else 11.0)
    world.close()
    (path / "status.json").write_text("{}")
    return path


def demo(path: Path) -> str:
    """A run directory made by hand; returns it as an argument."""
    run_dir = healthy_run(path / "demo").write()
    (run_dir / "status.json").write_text("{}")
    return str(run_dir)


def test_the_decisions_of_a_real_controller_come_out_the_same_byte_for_byte(tmp_path: Path) -> None:
    found = replay(journal_of(tmp_path / "r"))
    assert len(found.decisions) >= 2
    assert found.num_same == len(found.decisions)
    assert found.policy == found.own_policy == "goodput"


def test_a_journal_that_was_touched_no_longer_comes_out_the_same(run: Run, tmp_path: Path) -> None:
    journal = journal_of(tmp_path / "r") / "journal.jsonl"
    text = journal.read_text()
    assert '"reason":"goodput: 2 trials' in text
    touched = text.replace('"reason":"goodput: 2 trials', '"reason":"goodput: 3 trials', 1)
    journal.write_text(touched)
    assert "is damaged: ValueError its checksum does not fit" in run(str(tmp_path / "r"))[1]
    lines = [b"{" + line.partition(b",")[2] for line in touched.encode().splitlines(keepends=True)]
    journal.write_bytes(b"".join(sealed(line) for line in lines))  # by somebody who knows how
    code, out, _ = run(str(tmp_path / "r"))
    assert code == 1
    assert "decisions of goodput reproduced byte for byte" in out


def test_a_run_replays_its_own_policy(run: Run, tmp_path: Path) -> None:
    demo(tmp_path)
    code, out, _ = run(str(tmp_path / "demo"))
    assert (code, out) == (0, "demo: 2 of 2 decisions of tests.run_directory:TurningPolicy reproduced byte for byte\n")


def test_another_policy_says_what_it_would_have_done(run: Run, tmp_path: Path) -> None:
    demo(tmp_path)
    code, out, _ = run(str(tmp_path / "demo"), "--policy", "fair_share")
    assert code == 0
    assert "demo: fair_share instead of tests.run_directory:TurningPolicy on the same 2 snapshots" in out
    assert "plan 2 at" in out
    code, out, _ = run(str(tmp_path / "demo"), "--policy", "fair_share", "--json")
    answer: dict[str, Any] = json.loads(out)
    assert answer["num_decisions"] == 2
    assert answer["decisions"][1]["trials"][0]["recorded"]["tier"] == "bf16"
    assert answer["decisions"][1]["trials"][0]["decided"]["share"] == 0.5


def test_a_run_without_decisions_is_replayed_to_nothing(run: Run, tmp_path: Path) -> None:
    empty = RunDirectory(tmp_path / "demo")
    empty.begin("a")
    (empty.write() / "status.json").write_text("{}")
    assert run(str(tmp_path / "demo"))[:2] == (
        0,
        "demo: 0 of 0 decisions of tests.run_directory:TurningPolicy reproduced byte for byte\n",
    )


def test_a_workload_prints_its_figures(run: Run) -> None:
    code, out, _ = run("jobs.csv", "--cluster", "2x4", "--policy", POLICY)
    assert code == 0
    assert "jobs.csv under tests.unit.policies.simulator.worlds:FirstFit: 3 of 3 jobs ended" in out
    assert "assumed:" in out
    code, out, _ = run("jobs.csv", "--cluster", "2x4", "--policy", POLICY, "--json", "--interval", "30")
    answer = json.loads(out)
    assert {"jct_mean_s", "jct_p50_s", "jct_p99_s", "makespan_s", "goodput", "device_hours"} <= answer.keys()
    assert {"fairness_mean", "num_changes", "num_restarts", "jobs"} <= answer.keys()
    assert [job["name"] for job in answer["jobs"]] == ["a", "b", "c"]
    assert run("jobs.csv", "--cluster", "2x4", "--policy", POLICY, "--json", "--interval", "30")[1] == out


def test_a_made_up_workload_may_be_cut_short(run: Run) -> None:
    code, out, _ = run("philly-like", "--seed", "2", "--policy", POLICY, "--horizon", "1", "--json")
    answer = json.loads(out)
    assert (code, answer["num_jobs"] > answer["num_ended"]) == (0, True)
    assert answer["makespan_s"] <= 3660


def test_tables_of_others_are_applications(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tables" / "resnet"
    folder.mkdir(parents=True)
    (folder / "placements.csv").write_text("placement,local_bsz,step_time,sync_time\n1,8,0.1,0\n2,8,0.2,0.1\n")
    (folder / "validation-8.csv").write_text("progress,grad_sqr,grad_var\n100,1,2\n200,1,4\n")
    (folder / "validation-32.csv").write_text("progress,grad_sqr,grad_var\n200,1,4\n")
    (tmp_path / "mine.csv").write_text(HEAD + "a,0,resnet,2,16\n")
    code, out, _ = run("mine.csv", "--tables", "tables", "--cluster", "1x2", "--policy", POLICY, "--json")
    assert code == 0
    # two workers of eight samples: 1600 samples at efficiency (8 n + 8) / (8 n + 16), 0.2 s each step of 16
    seconds = 0.2 / 16 * (800 * (16 + 16) / (16 + 8) + 800 * (32 + 16) / (32 + 8))
    assert json.loads(out)["jct_mean_s"] == pytest.approx(30 + seconds)
    assert run("jobs.csv", "--tables", "tables")[0] == 2
    code, _, err = run("mine.csv", "--tables", str(tmp_path / "jobs.csv"))
    assert (code, "there is no application in" in err) == (2, True)


def test_nodes_may_leave_and_come_back(run: Run, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("time,node,change,price\n200,node0000,leaves,\n400,node0000,joins,\n")
    code, out, _ = run("jobs.csv", "--cluster", "1x4", "--events", "events.csv", "--policy", POLICY, "--json")
    assert (code, json.loads(out)["num_failures"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("missing.csv",), "cannot read missing.csv: No such file or directory; allowed: a CSV file"),
        (("bad.csv",), "bad.csv:2: application='cifar11'; allowed: bert, cifar10, "),
        (("jobs.csv", "--cluster", "4"), "--cluster: cluster '4': '4' is not a group of nodes"),
        (("jobs.csv", "--policy", "fairshare"), "there is no policy 'fairshare'"),
        (("jobs.csv", "--policy", POLICY, "--set", "part=1"), "has no parameter 'part'; allowed: share"),
        (("jobs.csv", "--policy", POLICY, "--set", "share"), "'share' is no parameter; allowed: KEY=VALUE"),
        (("jobs.csv", "--events", "jobs.csv"), "jobs.csv:1: column 'node' is missing"),
        (("jobs.csv", "--interval", "0"), "--interval"),
        (("jobs.csv", "--interval", "nan"), "--interval is nan"),
        (("jobs.csv", "--horizon", "nan"), "--horizon is nan"),
        (("philly-lik",), "did you mean 'philly-like'?"),
        (("nowhere",), "nowhere"),
    ],
)
def test_a_mistake_is_one_message(run: Run, tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    (tmp_path / "bad.csv").write_text(HEAD + "a,0,cifar11,2,256\n")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_a_policy_that_raises_is_one_message(run: Run, tmp_path: Path) -> None:
    demo(tmp_path)
    for target in ("jobs.csv", str(tmp_path / "demo")):
        code, out, err = run(target, "--policy", "tests.unit.policies.simulator.worlds:Raises")
        assert (code, out) == (1, "")
        assert "raised RuntimeError: no idea" in err
        assert "decision 1 at" in err


def test_pictures_are_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = run("jobs.csv", "--cluster", "1x4", "--policy", POLICY, "--plot", "pictures")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("wrote ")] == [
        f"wrote pictures/{name}.png" for name in ("gantt", "utilisation", "calibration")
    ]
    demo(tmp_path)
    assert run(str(tmp_path / "demo"), "--plot", "pictures")[0] == 0
    for name in ("gantt", "utilisation", "calibration", "shares"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_plot_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = run("jobs.csv", "--plot", "pictures")
    assert code == 3
    assert "install it with: pip install 'ray-orchestrator[plots]'" in err


def test_a_policy_of_ones_own_is_found_by_name() -> None:
    assert isinstance(build_policy(POLICY, {"share": 0.5}), FirstFit)
    assert spec(Path("/tmp"), "goodput").policy == "goodput"
