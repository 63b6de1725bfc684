"""Draws a run on a terminal: a live table where that is possible, else one plain line every few seconds.

Knows `view.frame` and rich, and of the run only what a callable hands it. `LiveView` runs in a thread of the driver;
`watch` follows the status file of a run in another process. Nothing is drawn while nothing changed.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from orchestrator import run_dirs
from orchestrator.clock import Clock, SystemClock
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SOME_FAILED, ConfigError
from orchestrator.view.frame import Frame, Role, build_frame, failure_text, plain_line
from orchestrator.view.report import count_failed
from orchestrator.view.text import dicts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

logger = logging.getLogger(__name__)

PLAIN_PERIOD_S = 5.0
"""Seconds between two plain lines."""

EXIT_CODES = {
    "done": EXIT_DONE,
    "failed": EXIT_FAILED,
    "interrupted": EXIT_INTERRUPTED,
    "lost": EXIT_FAILED,
}
"""What following a run to its end returns, by the state it ended in; of one that is done, if no trial failed."""

STYLES = {
    Role.TITLE: "bold",
    Role.HEAD: "underline",
    Role.RUNNING: "",
    Role.WAITING: "dim",
    Role.ENDED: "green",
    Role.FAILED: "red",
    Role.DETAIL: "dim",
    Role.DEVICE: "cyan",
    Role.NOTE: "",
}
"""How each kind of line looks, in rich's words; the picture in the README is drawn with the same."""
_FIXED_LINES = 6
_TERMINAL_GONE = (OSError, ValueError)
"""What writing to a terminal raises that hung up or was closed; the run goes on without it."""

Status = Mapping[str, Any]


class _Painter(Protocol):
    """One way to show a status."""

    def draw(self, status: Status, *, is_last: bool) -> None:
        """Show it, unless nothing worth showing changed."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


class LiveView:
    """Shows what `read_status` returns, once per period, in a thread of its own.

    Args:
        read_status: the newest status, or None where there is none yet; it must not block for long.
        plain: plain lines instead of a table; None decides by the terminal.
        out: where to; None is standard output.
        period_s: seconds between two looks at the status.
        clock: tests bring their own.
    """

    def __init__(
        self,
        read_status: Callable[[], Mapping[str, Any] | None],
        *,
        plain: bool | None = None,
        out: TextIO | None = None,
        period_s: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        self._read_status, self._period_s = read_status, period_s
        self._out = sys.stdout if out is None else out
        self._is_plain = is_plain_terminal(self._out) if plain is None else plain
        self._clock = clock or SystemClock()
        self._painter: _Painter | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._state = ""

    def start(self) -> None:
        """Begin to show; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="live-view", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Show the last status once more and give the terminal back. May be called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            self.refresh(is_last=True)
        except _TERMINAL_GONE:
            logger.warning("view.lost the terminal takes no output", exc_info=True)
        painter, self._painter = self._painter, None
        if painter is not None:
            with suppress(*_TERMINAL_GONE):
                painter.close()

    def refresh(self, *, is_last: bool = False) -> None:
        """Look at the status once and show what is new."""
        status = self._read_status()
        if status is None:
            return
        self._state = str(status.get("state", ""))
        if isinstance(self._painter, _Table) and is_plain_terminal(self._out):
            self._painter.close()  # the terminal hung up: its output goes to the log of the run
            self._painter, self._is_plain = None, True
        if self._painter is None:
            self._painter = _Lines(self._out, self._clock) if self._is_plain else _Table(self._out, self._clock)
        self._painter.draw(status, is_last=is_last)

    def follow(self, end_states: Container[str]) -> str:
        """Show, in the calling thread, until the run is in one of `end_states`; returns which."""
        self.refresh()
        while self._state not in end_states:
            self._stopping.wait(self._period_s)
            self.refresh()
        return self._state

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.refresh()
            except _TERMINAL_GONE:
                logger.warning("view.lost the terminal takes no output", exc_info=True)
                return
            self._stopping.wait(self._period_s)


class _Lines:
    """One line per period with the same facts as the table, and one more for each trial that failed."""

    def __init__(self, out: TextIO, clock: Clock) -> None:
        self._out, self._clock = out, clock
        self._next_s = 0.0
        self._last = ""
        self._failed: set[str] = set()

    def draw(self, status: Status, *, is_last: bool) -> None:
        for trial in dicts(status.get("trials")):
            trial_id = str(trial.get("trial_id"))
            if trial.get("state") == "failed" and trial_id not in self._failed:
                self._failed.add(trial_id)
                self._write(failure_text(trial))
        now_s = self._clock.now_s()
        if now_s < self._next_s and not is_last:
            return
        line = plain_line(status, self._clock.wall_s())
        if line != self._last:
            self._last, self._next_s = line, now_s + PLAIN_PERIOD_S
            self._write(line)

    def close(self) -> None:
        """A line needs nothing taken back."""

    def _write(self, line: str) -> None:
        try:
            self._out.write(line + "\n")
        except UnicodeEncodeError:
            self._out.write(line.encode("ascii", "replace").decode() + "\n")
        self._out.flush()


class _Table:
    """The live table, drawn by rich as plain text with one style per line."""

    def __init__(self, out: TextIO, clock: Clock) -> None:
        from rich.console import Console
        from rich.live import Live

        self._clock = clock
        self._console: Console = Console(file=out, highlight=False, markup=False, emoji=False)
        # What else the process prints goes above the table, unless the user sent it elsewhere.
        self._live: Live = Live(
            console=self._console,
            auto_refresh=False,
            vertical_overflow="crop",
            redirect_stdout=out is sys.stdout,
            redirect_stderr=out is sys.stdout and sys.stderr.isatty(),
        )
        self._live.start()
        self._last: tuple[object, Frame] | None = None

    def draw(self, status: Status, *, is_last: bool) -> None:
        from rich.text import Text

        size = self._console.size
        # One line is left free: a table as high as the screen scrolls at each refresh.
        max_rows = (1 << 30) if is_last else max(1, (size.height - _FIXED_LINES - 1) // 2)
        frame = build_frame(status, width=size.width, max_rows=max_rows, now_s=self._clock.wall_s())
        if self._last == (size, frame) and not is_last:
            return
        self._last = (size, frame)
        drawn = Text(no_wrap=True, overflow="crop", end="")
        for number, line in enumerate(frame.lines):
            drawn.append("\n" if number else "").append(line.text, style=STYLES[line.role])
        if is_last:
            self._live.vertical_overflow = "visible"
        self._live.update(drawn, refresh=True)

    def close(self) -> None:
        self._live.stop()


def is_plain_terminal(out: TextIO) -> bool:
    """Whether `out` cannot show a table that is redrawn. NO_COLOR is no reason: rich then draws without colours."""
    return not out.isatty() or os.environ.get("TERM", "") in {"", "dumb", "unknown"}


def read_status(path: Path) -> dict[str, Any] | None:
    """The content of a status file, None where it is missing or cannot be read."""
    return run_dirs.read_status(path.parent)


def watch(run_dir: Path, once: bool, *, out: TextIO | None = None) -> int:
    """Show the run of another process until it ends or the user has seen enough; the run does not notice.

    Args:
        run_dir: its directory.
        once: show it once and return.
        out: where to; None is standard output.

    Returns:
        0 when the run is done or `once`, 4 when it is done and trials failed, 1 when it failed or its driver is gone,
        130 when it was interrupted or the user pressed Ctrl-C.

    Raises:
        ConfigError: there is no status to show.
    """

    def look() -> dict[str, Any] | None:
        found = run_dirs.read_status(run_dir)
        return None if found is None else {**found, "state": run_dirs.state_of(run_dir, found)}

    stream = sys.stdout if out is None else out
    status = look()
    if status is None:
        raise ConfigError(
            f"{run_dir} has no readable {run_dirs.STATUS_FILE};"
            " give the directory that the run printed as its last line, or see `orchestrator list`"
        )
    if once:
        width = shutil.get_terminal_size().columns
        stream.write(build_frame(status, width=width, max_rows=1 << 30, now_s=time.time()).text + "\n")
        return 0
    view = LiveView(look, out=stream)
    try:
        state = view.follow(EXIT_CODES)
        return EXIT_SOME_FAILED if state == "done" and count_failed(look() or {}) else EXIT_CODES[state]
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]
    finally:
        view.stop()
