"""Standard output and error of a run, so that no terminal, pipe or file at the other end can change what the run does.

Whoever writes neither waits nor fails: a thread of each stream passes the text on. Once the other end is gone (a closed
pipe, a full device, a terminal that hung up), lines go to `run.log` in the run directory instead. Knows nothing of a
run but that file. Used by the driver and the command line.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

LOG_NAME = "run.log"
_MAX_WAITING = 4 << 20
"""Characters that may wait for a device that takes none; what is written meanwhile is dropped."""
_LAST_S = 5.0
"""Seconds that the last texts have when the run is over."""
_ESCAPE = "\x1b"


class Screen(io.TextIOBase):
    """A text stream that passes on what is written to a file descriptor, as long as somebody takes it.

    Args:
        stream: whose descriptor, encoding and terminal it takes; it is not written to.
        log: the file that plain lines go to when that is gone.
    """

    def __init__(self, stream: TextIO, log: Path) -> None:
        self._fd, self._log = os.dup(stream.fileno()), log
        self._encoding = stream.encoding or "utf-8"
        self._is_terminal = stream.isatty()
        self._waiting: deque[str] = deque()
        self._num_waiting, self._is_closing, self._is_writing = 0, False, False
        self._changed = threading.Condition()
        self.is_gone = False
        self._thread = threading.Thread(target=self._pass_on, name="screen", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As the stream's own."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        return self._is_terminal and not self.is_gone

    def fileno(self) -> int:
        """The descriptor; of a terminal, its size can be asked."""
        return self._fd

    def writable(self) -> bool:
        """Always: what cannot be passed on is dropped."""
        return True

    def write(self, text: str) -> int:
        """Take the text and return at once."""
        with self._changed:
            if self._num_waiting < _MAX_WAITING:
                self._waiting.append(text)
                self._num_waiting += len(text)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """The thread passes on what waits as soon as it is taken."""

    def leave(self) -> None:
        """The terminal is gone: write to the log from here on. May be called from a signal handler: takes no lock."""
        self.is_gone = True

    def settle(self, timeout_s: float = _LAST_S) -> None:
        """Wait until what was written is passed on, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_writing, timeout_s)

    def end(self, timeout_s: float = _LAST_S) -> bool:
        """Pass on what waits, at most so long; whether the other end is still there."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            return False
        os.close(self._fd)
        return not self.is_gone

    def _pass_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                text = self._waiting.popleft()
                self._num_waiting -= len(text)
                self._is_writing = True
            self._put(text)
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()

    def _put(self, text: str) -> None:
        if not self.is_gone:
            try:
                _write_all(self._fd, text.encode(self._encoding, "replace"))
            except OSError:
                self.is_gone = True
            else:
                return
        if _ESCAPE not in text:  # a table that is redrawn is nothing to a file
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.write(text)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def lasting_output(log: Path, *, is_quiet: bool = False) -> Iterator[TextIO]:
    """Standard output and error that last while the run does; with `is_quiet`, output that nobody sees.

    Yields:
        What leads to standard output, also when it is quiet.
    """
    before = sys.stdout, sys.stderr
    screens = [Screen(stream, log) for stream in before]
    quiet = Path(os.devnull).open("w", encoding="utf-8") if is_quiet else None  # noqa: SIM115 - closed below
    sys.stdout, sys.stderr = quiet or cast(TextIO, screens[0]), cast(TextIO, screens[1])
    try:
        yield cast(TextIO, screens[0])
    finally:
        sys.stdout, sys.stderr = before
        if quiet is not None:
            quiet.close()
        for screen, stream in zip(screens, before, strict=True):
            if not screen.end():
                give_up(stream)


def hang_up() -> None:
    """The terminal hung up: what is written from here on goes to the log. For a signal handler."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Screen):
            stream.leave()


def give_up(stream: TextIO) -> None:
    """Let the stream write to nowhere, so that the interpreter can flush it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Give a process that was started with closed standard streams some that lead nowhere.

    Otherwise the next file that it opens becomes its standard output, and whatever is printed is written into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w", encoding="utf-8", closefd=False))


def say(text: str) -> None:
    """Print a line for people, where somebody is there to read it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def say_last(text: str) -> None:
    """Print a line to standard error, behind everything that was printed."""
    if isinstance(sys.stdout, Screen):
        sys.stdout.settle()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    if isinstance(sys.stderr, Screen):
        sys.stderr.settle()
