"""The write-ahead journal of a run as a file: one canonical JSON line per event, synced before it takes effect.

The controller writes it and recovers from it with `read_events`, which takes no damage. `explain`, `verify`, the tables
and the simulator's replay use `read_history`, which reads what can be read and names the rest. A line that a crash cut
off was never acted upon, and is dropped.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.control.entries import decode, encode
from orchestrator.control.events import Event
from orchestrator.errors import ConfigError, JournalError

logger = logging.getLogger(__name__)

FILE_NAME = "journal.jsonl"
EventT = TypeVar("EventT", bound=Event)


def line_of(event: Event) -> bytes:
    """One canonical JSON line: sorted keys, no spaces, NaN refused."""
    return json.dumps(encode(event), sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a journal as JSON objects, oldest first; stops before a torn last line.

    Raises:
        JournalError: there is no such file, or a line before the last is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # what follows the last newline: empty, or torn
            return
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise JournalError(
                f"{path}:{number}: damaged journal line ({error}); entries before it are intact"
            ) from error
        yield entry


def read_events(path: Path) -> Iterator[Event]:
    """The events of a journal, oldest first; stops before a torn last line.

    Raises:
        JournalError: there is no such file, a line before the last is damaged, or a newer version wrote it.
    """
    for number, entry in enumerate(read(path), start=1):
        try:
            yield decode(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"{path}:{number}: damaged journal line ({type(error).__name__}: {error}); entries before it are intact"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A journal as far as it can be read.

    Attributes:
        entries: in file order.
        damage: one sentence per line that could not be read, or number that is missing.
        torn_tail_bytes: bytes after the last newline: cut off by a crash, or still being written.
    """

    entries: tuple[Event, ...]
    damage: tuple[str, ...]
    torn_tail_bytes: int

    def of(self, kind: type[EventT]) -> Iterator[EventT]:
        """Entries of one class, in order."""
        return (entry for entry in self.entries if type(entry) is kind)


def read_history(run_dir: Path) -> History:
    """Read the journal of a run, whatever its state.

    Raises:
        ConfigError: there is none: the directory is no run.
        JournalError: a newer version wrote it.
    """
    try:
        data = (run_dir / FILE_NAME).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{run_dir} is not a run directory: cannot read {FILE_NAME} ({error.strerror});"
            " give the directory that the run printed as its last line, or see `orchestrator list`"
        ) from error
    *lines, tail = data.split(b"\n")
    entries: list[Event] = []
    damage: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(decode(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            damage.append(f"line {number} is damaged: {type(error).__name__} {str(error)[:100]}")
    for before, after in pairwise(entries):
        if after.seq != before.seq + 1:
            damage.append(f"entry {before.seq} is followed by entry {after.seq}")
    return History(entries=tuple(entries), damage=tuple(damage), torn_tail_bytes=len(tail))


class Journal:
    """Appends events to one file. Not thread-safe: its owner is one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_torn_bytes = _drop_torn_tail(path)
        self._next_seq = 1 + sum(1 for _ in read(path)) if path.exists() else 1
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._is_dirty = False
        _sync_directory(path.parent)

    def append(self, event: Event) -> Event:
        """Write one event, durable only after `sync`; returns it with its number.

        Raises:
            JournalError: it was not written; the file is as it was.
        """
        numbered = replace(event, seq=self._next_seq)
        line = line_of(numbered)
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise JournalError(f"cannot write the journal {self._path}: {error.strerror}") from error
        if written != len(line):  # a full disk can cut a write short; leave no torn line in the middle
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise JournalError(f"cannot write the journal {self._path}: only {written} of {len(line)} bytes were taken")
        self._next_seq += 1
        self._is_dirty = True
        return numbered

    def sync(self) -> None:
        """Return once everything appended is on disk."""
        if self._is_dirty:
            os.fsync(self._file)
            self._is_dirty = False

    def close(self) -> None:
        """Sync and close; a closed journal takes no more entries."""
        self.sync()
        os.close(self._file)


def _drop_torn_tail(path: Path) -> int:
    """Cut what a crash left behind the last newline; returns how many bytes that was."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    torn = len(data) - (data.rfind(b"\n") + 1)
    if torn:
        os.truncate(path, len(data) - torn)
        logger.warning("dropped %d bytes of an unfinished journal line in %s", torn, path)
    return torn


def _sync_directory(directory: Path) -> None:
    """Make a new name in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
