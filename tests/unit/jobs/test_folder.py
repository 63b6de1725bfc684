"""Reading folders of data: what is found, and what a broken file does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from orchestrator.jobs.extras import load_extra
from orchestrator.jobs.folder import existing_folder, files_below, is_held_out, read_files


def number(path: Path) -> int:
    return int(path.read_text())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {"b/2.txt": "2", "a/1.TXT": "1", "a/bad.txt": "one", "c.md": "3", ".hidden/4.txt": "4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_files_are_found_in_order_whatever_the_case_of_their_ending(root: Path) -> None:
    assert files_below(root, (".txt",)) == ["a/1.TXT", "a/bad.txt", "b/2.txt"]


def test_a_broken_file_stops_and_is_named_with_what_to_do(root: Path) -> None:
    with pytest.raises(ValueError, match=r"a/bad\.txt cannot be read: invalid literal .*on_bad_file=skip"):
        read_files(root, files_below(root, (".txt",)), number, "stop")


def test_a_broken_file_is_left_out_and_named_when_asked_for(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_files(root, files_below(root, (".txt",)), number, "skip") == [("a/1.TXT", 1), ("b/2.txt", 2)]
    assert "a/bad.txt" in caplog.text
    assert "1 of 3 files" in caplog.text


def test_a_file_that_is_gone_is_a_broken_one(root: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read: .*No such file"):
        read_files(root, ["gone.txt"], number, "stop")


@pytest.mark.parametrize(("name", "message"), [("no/such", "does not exist"), ("c.md", "is a file")])
def test_what_is_no_folder_is_refused(root: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        existing_folder(str(root / name))


def test_the_choice_of_held_out_files_depends_on_the_path_alone() -> None:
    names = [f"{i}.txt" for i in range(2000)]
    assert 0.12 < sum(is_held_out(name, 38) for name in names) / 2000 < 0.18
    assert not any(is_held_out(name, 0) for name in names)
    assert all(is_held_out(name, 256) for name in names)


def test_a_library_that_is_missing_is_named_with_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"^data=digits needs scikit-learn, .*pip install scikit-learn .*'\.\[jobs\]'"):
        load_extra("sklearn.no_such_module", "data=digits")
