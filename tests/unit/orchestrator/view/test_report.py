from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.view.report import rank, render
from orchestrator.view.text import width_of
from tests.run_directory import status

RUN_DIR = Path("runs/demo")


def trials(*values: float | None) -> list[dict[str, Any]]:
    return [{"trial_id": f"t{index}", "index": index, "metric_value": value} for index, value in enumerate(values)]


@pytest.mark.parametrize(("mode", "order"), [("min", ["t2", "t0", "t1", "t3"]), ("max", ["t0", "t2", "t1", "t3"])])
def test_trials_are_ranked_by_the_metric_and_those_without_one_come_last(mode: str, order: list[str]) -> None:
    assert [trial["trial_id"] for trial in rank(trials(0.5, None, -1.0, float("nan")), mode)] == order


def test_the_last_line_is_the_run_directory() -> None:
    assert render(status(RUN_DIR, state="done"), RUN_DIR).splitlines()[-1] == "runs/demo"


def test_the_report_tells_ranking_failures_and_what_each_dial_did() -> None:
    lines = render(status(RUN_DIR, state="done"), RUN_DIR).splitlines()
    assert lines[0] == "run demo done after 1:23: 0 of 2 trials ended well, 1 failed, 12 plans by policy goodput"
    assert lines[3].split()[:3] == ["1", "trial-0001", "2.500"]
    assert lines[3].endswith("lr=0.01 width=64")
    assert "trial-0002 failed: ValueError: width must divide heads; log: runs/demo/trials/trial-0002/log.txt" in lines
    assert "dial share      5 changes applied, measured gain per change +31 % goodput" in lines
    assert "dial batch      2 changes applied, no gain measured" in lines
    assert "dial precision  off" in lines


@pytest.mark.parametrize(("state", "is_offered"), [("done", False), ("interrupted", True), ("failed", True)])
def test_resuming_is_offered_where_there_is_something_to_resume(state: str, is_offered: bool) -> None:
    assert ("orchestrator resume runs/demo" in render(status(RUN_DIR, state=state), RUN_DIR)) == is_offered


def test_commands_can_be_pasted_whatever_the_directory_is_called() -> None:
    text = render(status(RUN_DIR, state="done"), Path("my runs/it's; rm"))
    assert "orchestrator verify 'my runs/it'\"'\"'s; rm'" in text


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e"])
def test_hostile_names_are_shown_harmless(name: str) -> None:
    content = status(RUN_DIR, run_id=name, metric=name)
    content["trials"][0] |= {"trial_id": name, "params": {name: name}}
    content["trials"][1] |= {"error": name}
    assert all(line.isprintable() for line in render(content, RUN_DIR).split("\n"))


def test_a_run_without_trials_has_a_report_too() -> None:
    assert render({"state": "failed"}, RUN_DIR).endswith("\n\nruns/demo")


def test_a_long_ranking_is_cut_and_counted() -> None:
    content = status(RUN_DIR, trials=trials(*[float(value) for value in range(30)]))
    assert "... and 10 more" in render(content, RUN_DIR)


@pytest.mark.parametrize("width", [80, 120])
def test_thirty_parameters_fit_the_terminal_with_the_searched_ones_first(width: int) -> None:
    params = {"learning_rate": 0.0012345, "width": 64, **{f"fixed_{n}": "word" * 3 for n in range(28)}}
    content = status(RUN_DIR, metric="eval/loss")
    for trial in content["trials"]:
        trial["params"] = params
    lines = render(content, RUN_DIR, width=width).split("\n\n")[1].splitlines()
    assert lines[0].split()[:2] == ["trial", "eval/loss"]
    assert len(lines) == 1 + len(content["trials"])
    for line in lines[1:]:
        assert width_of(line) <= width
        assert "learning_rate=0.001234 " in line
        assert line.endswith("..." if width == 80 else "... fixed_27=wordwordword")
