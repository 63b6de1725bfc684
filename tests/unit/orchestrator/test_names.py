"""No name leads out of the directory it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.names import check_name, is_safe_name, run_directory, safe_child, write_atomically

SEPARATORS = [
    "/",
    "\\",
    "\u2215",
    "\u2044",
    "\uff0f",
    "\x00",
    "\n",
    "\r",
    "\t",
    " ",
    ":",
    ";",
    "%2f",
    "$",
    "*",
    "\u202e",
]
BASES = ["", ".", "..", "...", "../", "../../", "/", "/etc/passwd", "~", "~root", "-", "-rf", "--help", "_x", ".hidden"]
CORPUS = [
    *BASES,
    *(f"..{separator}x" for separator in SEPARATORS),
    *(f"a{separator}..{separator}..{separator}x" for separator in SEPARATORS),
    *(f"a{separator}" for separator in SEPARATORS),
    *(f"{separator}a" for separator in SEPARATORS),
    *(f"{'../' * depth}x" for depth in range(1, 60)),
    *(f"a/{'../' * depth}x" for depth in range(1, 60)),
    *("x" * length for length in (65, 100, 255, 256, 300, 4096, 100_000)),
    "\u00e9", "\u0430bc", "a\u0301", "\ufeffa", "\u200ba", "a\u2028b", "name\n", "name\r\n",
    "\x1b[31m", "a\x7f", "\ud800",
    "C:\\x", "\\\\host\\x", "file:///etc", "s3://bucket/x", "a?b", "a|b", "a>b", "a&b", "`id`",
    "$(id)", "${HOME}", "{{x}}",
]  # fmt: skip


def test_the_corpus_is_large_enough() -> None:
    assert len(set(CORPUS)) >= 200


@pytest.mark.parametrize("name", sorted(set(CORPUS)), ids=lambda name: ascii(name)[:40])
def test_a_hostile_name_is_refused(tmp_path: Path, name: str) -> None:
    for refuse in (check_name, lambda n: run_directory(tmp_path, n), lambda n: safe_child(tmp_path, "trials", n)):
        with pytest.raises(ConfigError) as caught:
            refuse(name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "A1", "demo", "demo-2", "v1.0_x", "0", "x" * 64, "a..b", "CON"])
def test_an_ordinary_name_is_one_component_of_the_storage(tmp_path: Path, name: str) -> None:
    assert run_directory(tmp_path, name) == tmp_path.resolve() / name


@given(st.text(max_size=70))
def test_a_safe_name_is_one_plain_path_component(name: str) -> None:
    if is_safe_name(name):
        assert name.isascii()
        assert Path(name).parts == (name,)
        assert not name.startswith((".", "-"))


def test_a_link_on_the_way_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    storage = tmp_path / "storage"
    outside.mkdir()
    storage.mkdir()
    (storage / "run").symlink_to(outside)
    (storage / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("run", "dangling"):
        with pytest.raises(ConfigError, match="symbolic link"):
            run_directory(storage, name)
    with pytest.raises(ConfigError, match="symbolic link"):
        safe_child(storage, "run", "x")


def test_the_storage_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run_directory(tmp_path / "link", "one") == (tmp_path / "real" / "one").resolve()


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    write_atomically(path, "graceful")
    write_atomically(path, "now")
    assert path.read_text(encoding="utf-8") == "now"
    assert [p.name for p in tmp_path.iterdir()] == ["stop"]


def test_an_unfinished_file_of_a_dead_writer_does_not_get_in_the_way(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious", encoding="utf-8")
    (tmp_path / ".stop.new").symlink_to(outside)
    write_atomically(tmp_path / "stop", "now")
    assert outside.read_text(encoding="utf-8") == "precious"
    assert (tmp_path / "stop").read_text(encoding="utf-8") == "now"
