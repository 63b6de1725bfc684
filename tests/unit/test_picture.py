"""The picture in the README is what the live table draws today from the status of a real run."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.view.frame import build_frame
from tests.unit.test_readme import INSIDE, keys_by_part, names, rows, section

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_picture", DOCS / "make_picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def status() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((DOCS / "live-table.json").read_text(encoding="ascii"))
    return kept


def shown(svg: str) -> list[str]:
    """The lines of text of a picture, in order, without its title."""
    lines: dict[int, str] = {}
    for number, text in re.findall(r"<text [^>]*clip-path=\"url\(#table-line-(\d+)\)\">(.*?)</text>", svg, re.DOTALL):
        lines[int(number)] = lines.get(int(number), "") + html.unescape(text).replace("\xa0", " ").strip("\n")
    *shown_lines, free = [lines[number].rstrip() for number in sorted(lines)]
    assert free == "", "the last line is kept free"
    return shown_lines


def test_the_picture_shows_what_the_view_draws_from_the_kept_status(
    picture: ModuleType, status: dict[str, Any]
) -> None:
    frame = build_frame(status, width=picture.WIDTH, max_rows=1 << 30, now_s=status["updated_at"])
    kept = (DOCS / "live-table.svg").read_text(encoding="ascii")
    assert shown(kept) == [line.text for line in frame.lines]


def test_drawing_it_again_gives_the_same_lines(picture: ModuleType, status: dict[str, Any]) -> None:
    assert shown(picture.draw(status)) == shown((DOCS / "live-table.svg").read_text(encoding="ascii"))


def test_the_kept_status_has_the_keys_of_today(status: dict[str, Any]) -> None:
    listed = {row[0]: sorted(names(row[1])) for row in rows(section(INSIDE, "status.json"))}
    found = {part: sorted(keys) for part, keys in keys_by_part(status).items()}
    assert found == {part: keys for part, keys in listed.items() if part in found}
    assert listed.keys() - found.keys() == {"`nodes[]`"}, "it asked for no nodes"


def test_it_is_of_a_run_that_goes_on_with_every_dial_turned(status: dict[str, Any]) -> None:
    assert status["state"] == "running"
    assert sum(trial["state"] == "running" for trial in status["trials"]) >= 2
    assert all(dial["changes_applied"] >= 2 for dial in status["dials"].values())


def test_nothing_is_loaded_from_elsewhere_and_no_path_of_a_machine_is_kept() -> None:
    svg, kept = (DOCS / "live-table.svg").read_text(), (DOCS / "live-table.json").read_text()
    assert set(re.findall(r"https?://[^\"<\s]+", svg)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", svg)
    assert not re.findall(r"\"/[^\"]*\"", kept)


def test_the_script_keeps_and_draws_the_status_of_a_run_directory(
    picture: ModuleType, status: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    trials = [{**trial, "log_path": str(run_dir / "log.txt")} for trial in status["trials"]]
    (run_dir / "status.json").write_text(json.dumps({**status, "run_id": "other", "trials": trials}))
    monkeypatch.setattr(picture, "STATUS_FILE", tmp_path / "live-table.json")
    monkeypatch.setattr(picture, "PICTURE_FILE", tmp_path / "live-table.svg")
    assert picture.main([str(run_dir)]) == 0
    assert str(tmp_path) not in (tmp_path / "live-table.json").read_text()
    assert "other" in shown((tmp_path / "live-table.svg").read_text())[0]


def test_the_script_names_what_is_no_run_directory(
    picture: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert picture.main([str(tmp_path)]) == 2
    assert "status.json" in capsys.readouterr().err
