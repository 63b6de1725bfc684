"""The write-ahead journal of a run: canonical JSON lines, appended, synced before they take effect.

It stores values and knows nothing of what they mean. The controller writes it and recovers from it; `explain`, `verify`
and the simulator read it. A line that was cut off by a crash was never acknowledged to anyone and is dropped.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import JournalError

logger = logging.getLogger(__name__)

FILE_NAME = "journal.jsonl"
SCHEMA_VERSION = 1
SPARE_REASON = "fair shares while the policy is refused"
"""How the reason of a plan begins that stands in for a refused policy; a replay decides it with `FairShare`."""


def encode(entry: dict[str, Any]) -> bytes:
    """One canonical JSON line: sorted keys, no spaces, NaN refused."""
    try:
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JournalError(f"journal entry {entry.get('kind')!r} is not plain JSON: {error}") from error
    return text.encode() + b"\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a journal, oldest first; stops before a torn last line.

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


class Journal:
    """Appends entries to one file. Not thread-safe: its owner is one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_torn_bytes = _drop_torn_tail(path)
        self._next_seq = 1 + sum(1 for _ in read(path)) if path.exists() else 1
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._is_dirty = False
        _sync_directory(path.parent)

    @property
    def next_seq(self) -> int:
        """Number the next entry will get; the first is 1."""
        return self._next_seq

    def append(self, kind: str, now_s: float, wall_s: float, **fields: object) -> int:
        """Write one entry and return its number. It is durable only after `sync`."""
        seq = self._next_seq
        line = encode({"kind": kind, "seq": seq, "t_s": now_s, "wall_s": wall_s, **fields})
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise JournalError(f"cannot write the journal {self._path}: {error.strerror}") from error
        if written != len(line):  # a full disk can cut a write short; leave no torn line in the middle
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise JournalError(f"cannot write the journal {self._path}: only {written} of {len(line)} bytes were taken")
        self._next_seq = seq + 1
        self._is_dirty = True
        return seq

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
