"""Output that closes, blocks or was never open: what is written neither waits nor fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest

from orchestrator.output import Screen, open_standard_streams, say

ROOT = Path(__file__).parents[3]


def pipe() -> tuple[int, TextIO]:
    reader, writer = os.pipe()
    return reader, os.fdopen(writer, "w", encoding="utf-8")


def test_what_is_written_arrives_in_order(tmp_path: Path) -> None:
    reader, stream = pipe()
    screen = Screen(stream, tmp_path / "run.log")
    for number in range(100):
        screen.write(f"{number}\n")
    screen.settle()
    assert os.read(reader, 10_000).decode() == "".join(f"{number}\n" for number in range(100))
    assert screen.end()
    assert not (tmp_path / "run.log").exists()
    stream.close()
    os.close(reader)


def test_after_the_reader_has_gone_lines_are_in_the_log_and_tables_are_not(tmp_path: Path) -> None:
    reader, stream = pipe()
    os.close(reader)
    screen = Screen(stream, tmp_path / "run.log")
    screen.write("one\n")
    screen.write("\x1b[2K a table that is redrawn")
    screen.write("two\n")
    assert not screen.end(), "the other end is gone"
    assert (tmp_path / "run.log").read_text() == "one\ntwo\n"
    assert not screen.isatty()
    stream.close()


def test_a_terminal_that_hung_up_is_left_at_once(tmp_path: Path) -> None:
    reader, stream = pipe()
    screen = Screen(stream, tmp_path / "run.log")
    screen.leave()
    screen.write("later\n")
    screen.end()
    assert (tmp_path / "run.log").read_text() == "later\n"
    stream.close()
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_a_device_that_takes_nothing_holds_nobody_up(tmp_path: Path) -> None:
    reader, stream = pipe()
    screen = Screen(stream, tmp_path / "run.log")
    began_s = time.monotonic()
    for _ in range(200):
        screen.write("x" * 100_000)  # far more than a pipe and the queue take
    assert not screen.end(timeout_s=0.1)
    assert time.monotonic() - began_s < 5.0
    os.close(reader)  # lets the thread end
    stream.close()


def test_text_that_the_device_cannot_spell_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", encoding="ascii")
    screen = Screen(stream, tmp_path / "run.log")
    screen.write("\N{GREEK SMALL LETTER MU}s\n")
    assert screen.end()
    assert os.read(reader, 10) == b"?s\n"
    stream.close()
    os.close(reader)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_file_that_is_opened_is_never_taken_for_a_closed_standard_stream(tmp_path: Path, closed: str) -> None:
    code = (
        "from orchestrator.output import open_standard_streams; open_standard_streams()\n"
        "import sys; file = open('file', 'w'); assert file.fileno() > 2\n"
        "print('to stdout'); print('to stderr', file=sys.stderr); sys.stdout.flush(); file.close()\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=50,
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_streams_that_are_open_are_left_alone() -> None:
    before = sys.stdout, sys.stderr
    open_standard_streams()
    assert (sys.stdout, sys.stderr) == before


def test_saying_something_into_a_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, stream = pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", stream)
    say("anybody there?")
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
