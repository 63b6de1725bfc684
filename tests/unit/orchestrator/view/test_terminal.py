from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import run_dirs
from orchestrator.clock import ManualClock
from orchestrator.errors import ConfigError
from orchestrator.view import terminal
from orchestrator.view.terminal import PLAIN_PERIOD_S, LiveView, is_plain_terminal, watch
from tests.run_directory import status

RUN_DIR = Path("runs/demo")
ESCAPE = "\x1b"


class Screen(io.StringIO):
    """A terminal that can redraw."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def view_of(content: dict[str, Any], out: io.StringIO, clock: ManualClock, *, plain: bool | None = None) -> LiveView:
    return LiveView(lambda: content, plain=plain, out=out, clock=clock)


def clock_at(wall_s: float = 1083.0) -> ManualClock:
    return ManualClock(wall_s)


def test_a_terminal_gets_a_table_and_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_plain_terminal(Screen())
    assert is_plain_terminal(io.StringIO())
    for term in ("dumb", ""):
        monkeypatch.setenv("TERM", term)
        assert is_plain_terminal(Screen())


def test_the_table_is_redrawn_only_when_something_changed() -> None:
    out, content = Screen(), status(RUN_DIR)
    view = view_of(content, out, clock_at())
    view.refresh()
    drawn = out.tell()
    assert "trial-0001" in out.getvalue()
    view.refresh()
    assert out.tell() == drawn
    content["trials"][0]["step"] = 1235
    view.refresh()
    assert out.tell() > drawn
    view.stop()


def test_no_colour_is_used_when_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Screen()
    view = view_of(status(RUN_DIR), out, clock_at())
    view.refresh()
    view.stop()
    assert f"{ESCAPE}[31m" not in out.getvalue()
    assert f"{ESCAPE}[36m" not in out.getvalue()


def test_colour_is_used_otherwise() -> None:
    out = Screen()
    view = view_of(status(RUN_DIR), out, clock_at())
    view.refresh()
    view.stop()
    assert f"{ESCAPE}[31m" in out.getvalue()


def test_markup_in_names_is_shown_not_obeyed() -> None:
    out, content = Screen(), status(RUN_DIR)
    content["trials"][0]["trial_id"] = "[red]a[/]"
    content["trials"][1]["error"] = f"[link=http://x]:smile:{ESCAPE}[2J"
    view = view_of(content, out, clock_at())
    view.refresh()
    view.stop()
    assert "[red]a[/]" in out.getvalue()
    assert "[link=http://x]:smile:\\x1b[2J" in out.getvalue()
    assert f"{ESCAPE}[2J" not in out.getvalue()


def test_a_table_never_fills_the_screen_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "20")
    out, content = Screen(), status(RUN_DIR)
    content["trials"] = [{**content["trials"][0], "trial_id": f"t{n}", "index": n} for n in range(50)]
    view = view_of(content, out, clock_at())
    view.refresh()
    assert out.getvalue().count("\n") < 20
    assert "and 44 more" in out.getvalue()
    view.stop()
    assert "t49" in out.getvalue()


def test_plain_lines_come_every_few_seconds_and_only_when_news_is_there() -> None:
    out, content, clock = io.StringIO(), status(RUN_DIR), clock_at()
    view = view_of(content, out, clock)
    view.refresh()
    clock.advance(PLAIN_PERIOD_S / 2)
    view.refresh()
    assert len(out.getvalue().splitlines()) == 2
    clock.advance(PLAIN_PERIOD_S)
    content["trials"][0]["step"] = 1300
    view.refresh()
    first, second, third = out.getvalue().splitlines()
    assert first == "trial-0002 failed: ValueError: width must divide heads; log: runs/demo/trials/trial-0002/log.txt"
    assert "step 1234" in second
    assert "step 1300" in third
    assert ESCAPE not in out.getvalue()


def test_the_last_status_is_shown_at_the_end_whatever_the_time() -> None:
    out, content, clock = io.StringIO(), status(RUN_DIR), clock_at()
    view = view_of(content, out, clock)
    view.refresh()
    content["state"] = "done"
    view.stop()
    assert "done plan 12" in out.getvalue().splitlines()[-1]


def test_a_stream_that_knows_ascii_only_gets_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    content = status(RUN_DIR)
    content["trials"][0]["trial_id"] = "\u4e2d"
    view = LiveView(lambda: content, plain=True, out=out, clock=clock_at())
    view.refresh()
    assert b"? step 1234" in raw.getvalue()


def test_the_view_runs_in_its_own_thread_until_it_is_stopped() -> None:
    seen = threading.Event()

    def read() -> dict[str, Any] | None:
        seen.set()
        return None

    view = LiveView(read, plain=True, out=io.StringIO(), period_s=0.001)
    view.start()
    view.start()
    assert seen.wait(10)
    view.stop()
    view.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "live-view"]


def test_a_terminal_that_went_away_stops_the_view_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    out.close()
    view = LiveView(lambda: status(RUN_DIR), plain=True, out=out)
    view.start()
    view.stop()
    assert "view.lost" in caplog.text


def test_a_table_becomes_lines_when_its_terminal_hangs_up() -> None:
    """They go to the log of the run, where a table that is redrawn is nothing."""
    out, content = Screen(), status(RUN_DIR)
    view = view_of(content, out, clock_at())
    view.refresh()
    assert ESCAPE in out.getvalue()
    out.isatty = lambda: False  # type: ignore[method-assign]
    drawn = len(out.getvalue())
    view.refresh()
    lines = out.getvalue()[drawn:].splitlines()
    assert any("running plan 12" in line and ESCAPE not in line for line in lines)
    view.stop()


def put(run_dir: Path, **changes: Any) -> None:
    (run_dir / "status.json").write_text(json.dumps(status(run_dir, **changes)))


def well(run_dir: Path) -> list[dict[str, Any]]:
    """The trials without the one that failed."""
    return [trial for trial in status(run_dir)["trials"] if trial["state"] != "failed"]


@pytest.mark.parametrize(
    ("state", "fails", "code"), [("done", False, 0), ("done", True, 4), ("failed", True, 1), ("interrupted", True, 130)]
)
def test_watching_ends_with_the_run_and_returns_how_it_ended(
    tmp_path: Path, state: str, fails: bool, code: int
) -> None:
    put(tmp_path, state=state, **({} if fails else {"trials": well(tmp_path)}))
    out = io.StringIO()
    assert watch(tmp_path, False, out=out) == code
    assert f"{state} plan 12" in out.getvalue()


def test_a_run_is_watched_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, state="running")
    looks = []

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        looks.append(timeout)
        if len(looks) == 3:
            put(tmp_path, state="done", trials=well(tmp_path))
        return False

    monkeypatch.setattr(threading.Event, "wait", wait)
    assert watch(tmp_path, False, out=io.StringIO()) == 0
    assert looks == [1.0, 1.0, 1.0]


def test_watching_ends_where_the_driver_is_gone_without_a_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, state="running")
    monkeypatch.setattr(run_dirs, "is_driver_gone", lambda _run_dir: True)
    for once, code in ((True, 0), (False, 1)):
        out = io.StringIO()
        assert watch(tmp_path, once, out=out) == code
        assert "lost" in out.getvalue()
        assert "running plan" not in out.getvalue()


def test_ctrl_c_ends_the_watching_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, state="running")

    def interrupt(self: threading.Event, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", interrupt)
    assert watch(tmp_path, False, out=io.StringIO()) == 130


def test_watching_once_shows_the_whole_table_once(tmp_path: Path) -> None:
    put(tmp_path)
    out = io.StringIO()
    assert watch(tmp_path, True, out=out) == 0
    assert out.getvalue().count("trial-0001 ") == 1
    assert ESCAPE not in out.getvalue()


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_directory_without_a_status_cannot_be_watched(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no readable status\.json"):
        watch(tmp_path, True, out=io.StringIO())


def test_a_status_file_is_read_by_its_path(tmp_path: Path) -> None:
    assert terminal.read_status(tmp_path / "status.json") is None
    put(tmp_path)
    content = terminal.read_status(tmp_path / "status.json")
    assert content is not None
    assert content["run_id"] == "demo"


def test_a_table_on_another_stream_leaves_standard_output_alone() -> None:
    out = Screen()
    before = sys.stdout
    view = view_of(status(RUN_DIR), out, clock_at())
    view.refresh()
    assert sys.stdout is before
    view.stop()
