"""What a notebook shows of a run; IPython's part is played by a module of the same shape."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import orchestrator
from orchestrator import run_process
from orchestrator.view.notebook import LiveTable, notebook, status_html
from tests.run_directory import status


class Screen:
    """`IPython.display` as far as it is used: `display` returns a handle, whose `update` shows something else."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.was_updated = threading.Event()

    def HTML(self, text: str) -> str:  # noqa: N802 - as IPython's
        return text

    def display(self, shown: str, *, display_id: bool) -> Screen:
        assert display_id
        self.shown.append(shown)
        return self

    def update(self, shown: str) -> None:
        self.shown[-1] = shown
        self.was_updated.set()


def shell(**attributes: Any) -> ModuleType:
    module = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(**attributes)  # type: ignore[attr-defined]
    return module


def test_the_table_names_trials_best_first_with_metric_dials_and_parameters() -> None:
    content = status(Path("runs/demo"), metric="eval/loss")
    content["trials"][1]["metric_value"] = 1.5
    text = status_html(content)
    assert text.index("trial-0002") < text.index("trial-0001")
    for part in (
        "<b>demo: running after 1:23",
        "<th>eval/loss</th>",
        "<td>2.500</td>",
        "<td>16 x 2</td>",
        "<td>bf16</td>",
    ):
        assert part in text
    assert "lr=0.01 width=64" in text
    assert "ValueError: width must divide heads" in text


def test_what_users_wrote_is_escaped_and_many_trials_are_counted() -> None:
    content = status(Path("runs/demo"), run_id="<script>alert(1)</script>")
    content["trials"] = [{**content["trials"][0], "params": {"<b>": "&"}}] * 50
    text = status_html(content)
    assert "<script>" not in text
    assert "&lt;b&gt;=&amp;" in text
    assert text.count("<tr>") == 21
    assert "... and 30 more" in text


def test_a_table_is_updated_in_place_and_shows_the_end() -> None:
    screen, content = Screen(), status(Path("runs/demo"))
    with LiveTable(screen, lambda: content, period_s=0.001):
        assert screen.was_updated.wait(30)
        content = {**content, "state": "done"}
    assert len(screen.shown) == 1, "one place in the output"
    assert "demo: done" in screen.shown[0]


@pytest.mark.parametrize(("attributes", "is_notebook"), [({"kernel": object()}, True), ({}, False)])
def test_only_the_kernel_of_a_notebook_is_one(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], is_notebook: bool
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", shell(**attributes))
    display = ModuleType("IPython.display")
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert notebook() is (display if is_notebook else None)


def test_without_ipython_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert notebook() is None
    assert "IPython" not in sys.modules


def test_a_run_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps(status(tmp_path)))
    assert orchestrator.Run(tmp_path)._repr_html_() == status_html(status(tmp_path))


def test_the_run_directory_is_known_before_the_run_begins_and_an_older_run_in_it_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "a", "storage": str(tmp_path)}))
    (tmp_path / "b").mkdir()
    read = run_process.status_of(file, ["name=b"])
    assert read() is None
    (tmp_path / "b" / "status.json").write_text(json.dumps({"schema": 1, "started_at": 1.0}))
    assert read() is None, "of a run before"
    (tmp_path / "b" / "status.json").write_text(json.dumps({"schema": 1, "started_at": 1e12}))
    assert read() is not None


@pytest.mark.parametrize("line", ["0:05 running plan 3: 2 trials", "1:00:05 done plan 3: 2 trials"])
def test_lines_that_the_table_replaces_are_known(line: str) -> None:
    assert run_process._PROGRESS.match(line)
    assert not run_process._PROGRESS.match("trial-00001 failed: NameError")
