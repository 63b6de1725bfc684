"""Where a user's function runs: a working directory of its own, and a log that holds what it prints.

`trials/ID/work` is current while the function runs, so that relative paths of trials do not meet. As Ray Tune does, the
directory that was current before is named in TUNE_ORIG_WORKING_DIR.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from orchestrator.room import POLL_S, is_full

WORK = "work"
"""A trial's working directory, below its own."""

ORIGINAL_DIRECTORY = "TUNE_ORIG_WORKING_DIR"
"""The variable in which Ray Tune's trials find it."""


class LogStream(io.TextIOBase):
    """A text stream whose lines go to a log file as they are; of one that a progress bar rewrites its last form only.

    Knows no terminal: `isatty` is False, so that libraries draw no colours.
    """

    def __init__(self, handler: logging.FileHandler) -> None:
        self._handler, self._line = handler, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the log file."""
        return "utf-8"

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Write whole lines; the rest waits for its end."""
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._put(line)
        self._line = rest.rpartition("\r")[2] if "\r" in rest else rest
        return len(text)

    def flush(self) -> None:
        """Lines are written when they end."""

    def close_line(self) -> None:
        """Write what has no end yet."""
        if self._line:
            self._put(self._line)
            self._line = ""

    def _put(self, line: str) -> None:
        shown = line.rstrip("\r").rpartition("\r")[2]
        self._handler.acquire()
        try:
            if self._handler.stream is not None:
                # On a full disk the rest is written with a later line, or lost; printing must not fail.
                with suppress(OSError):
                    self._handler.stream.write(f"{shown}\n")
                    self._handler.stream.flush()
        finally:
            self._handler.release()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Write what this process prints, and what any logger says, to a file."""
    handler = _opened(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, stream = logging.getLogger(), LogStream(handler)
    before, others = root.level, root.handlers[:]
    root.handlers[:] = [handler]  # others write to the standard streams, which lead to the same file
    if before > logging.INFO:
        root.setLevel(logging.INFO)
    try:
        with redirect_stdout(stream), redirect_stderr(stream):
            yield
    finally:
        stream.close_line()
        root.handlers[:] = others
        root.setLevel(before)
        with suppress(OSError):  # a full disk
            handler.close()


def _opened(path: Path) -> logging.FileHandler:
    """The log file, as soon as the disk has room for it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            if not is_full(error):
                raise
            time.sleep(POLL_S)


def own_path(path: str | os.PathLike[str], directory: Path) -> Path | None:
    """Where an absolute path leads in a trial that would share it with others: into its working directory.

    Args:
        path: as a training gives it.
        directory: the trial's own.

    Returns:
        None for a relative path, and for one that is in the trial's directory already.
    """
    asked = Path(path).expanduser()
    if not asked.is_absolute() or asked.resolve().is_relative_to(directory.resolve()):
        return None
    return directory / WORK / asked.relative_to(asked.anchor)


@contextmanager
def working_directory(directory: Path) -> Iterator[None]:
    """Make `directory` and run there."""
    directory.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    original = os.environ.setdefault(ORIGINAL_DIRECTORY, str(before))
    has_path = original in sys.path
    if not has_path:
        sys.path.append(original)  # a relative import path of the user's
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
