"""The write-ahead journal of a run as a file: one canonical JSON line per event, synced before it takes effect.

The controller writes it and recovers from it with `read_events`, which takes no damage. `explain`, `verify`, the tables
and the simulator's replay use `read_history`, which reads what can be read and names the rest. A line that a crash cut
off was never acted upon, and is dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.control.entries import decode, encode
from orchestrator.control.events import Event
from orchestrator.errors import ConfigError, JournalError
from orchestrator.room import is_full, words

logger = logging.getLogger(__name__)

FILE_NAME = "journal.jsonl"
_ROTATED = "journal-"
"""How the name of a file that is full begins; the number of its last entry follows."""
_SEAL = b'{"_crc":"%08x",'
_SEALED = re.compile(rb'\{"_crc":"([0-9a-f]{8})",')
EventT = TypeVar("EventT", bound=Event)


def line_of(event: Event) -> bytes:
    """One canonical JSON line: sorted keys, no spaces, NaN refused; without its checksum."""
    return json.dumps(encode(event), sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def sealed(line: bytes) -> bytes:
    """A canonical line with the checksum of all the rest as its first key."""
    return _SEAL % zlib.crc32(line.rstrip(b"\n")) + line[1:]


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, without its checksum; journals of schema 1 have none.

    Raises:
        ValueError: it is no JSON object, or not what was written.
    """
    match = _SEALED.match(line)
    if match is not None:
        line = b"{" + line[match.end() :]
        if zlib.crc32(line) != int(match[1], 16):
            raise ValueError("its checksum does not fit")
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    return entry


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a journal as JSON objects, oldest first; stops before a torn last line.

    Raises:
        JournalError: there is no such file, a line before the last is damaged, or one is missing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
    lines = data.split(b"\n")
    last = 0
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # what follows the last newline: empty, or torn
            return
        try:
            entry = parse(line)
        except ValueError as error:
            raise _damaged(path, number, str(error)) from error
        seq = entry.get("seq")
        if last and isinstance(seq, int) and seq != last + 1:
            raise _damaged(path, number, f"entry {last} is followed by entry {seq}")
        last = seq if isinstance(seq, int) else 0
        yield entry


def read_events(path: Path) -> Iterator[Event]:
    """The events of a journal, oldest first; stops before a torn last line.

    Raises:
        JournalError: there is no such file, a line before the last is damaged, or a newer version wrote it.
    """
    run_id = ""
    for number, entry in enumerate(read(path), start=1):
        run_id = run_id or str(entry.get("run_id", ""))
        try:
            yield decode(entry, run_id)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, number, f"{type(error).__name__}: {error}") from error


def segments(run_dir: Path) -> list[Path]:
    """The files of a journal, oldest first; the last one is written to, and may not be there yet."""
    return [*sorted(run_dir.glob(f"{_ROTATED}*.jsonl")), run_dir / FILE_NAME]


def has_entries(run_dir: Path) -> bool:
    """Whether a run has a journal with anything in it."""
    return any(path.exists() and path.stat().st_size for path in segments(run_dir))


def read_run(run_dir: Path, behind: int = 0) -> Iterator[Event]:
    """The events of a run's journal behind entry `behind`, oldest first.

    Raises:
        JournalError: a line is damaged, or one is missing.
    """
    last = behind
    for path in segments(run_dir):
        if not path.exists() or 0 < _last_of_name(path) <= behind:
            continue
        for event in read_events(path):
            if event.seq <= behind:
                continue
            if event.seq != last + 1:
                raise _damaged(path, 1, f"entry {last} is followed by entry {event.seq}")
            last = event.seq
            yield event


def _last_of_name(path: Path) -> int:
    """Number of the last entry of a file that is full; 0 for the one that is written to."""
    return int(path.stem.removeprefix(_ROTATED)) if path.name != FILE_NAME else 0


def _damaged(path: Path, number: int, why: str) -> JournalError:
    return JournalError(
        f"{path}:{number}: damaged journal line ({why}); entries before it are intact; see what can be saved with:"
        f" orchestrator repair {path.parent}"
    )


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
    entries: list[Event] = []
    damage: list[str] = []
    tail = b""
    files = [path for path in segments(run_dir) if path.exists() or path.name == FILE_NAME]
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            if path.name == FILE_NAME and len(files) > 1:
                break  # the file before it is full, and nothing has happened since
            raise ConfigError(
                f"{run_dir} is not a run directory: cannot read {path.name} ({error.strerror});"
                " give the directory that the run printed as its last line, or see `orchestrator list`"
            ) from error
        *lines, tail = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(decode(parse(line)))
            except (KeyError, TypeError, ValueError) as error:
                place = "" if path.name == FILE_NAME else f" of {path.name}"
                damage.append(f"line {number}{place} is damaged: {type(error).__name__} {str(error)[:100]}")
    for before, after in pairwise(entries):
        if after.seq != before.seq + 1:
            damage.append(f"entry {before.seq} is followed by entry {after.seq}")
    return History(entries=tuple(entries), damage=tuple(damage), torn_tail_bytes=len(tail))


class Journal:
    """Appends events to one file.

    Appending belongs to one event loop; `sync` may run in another thread meanwhile. What was appended is kept in memory
    until it is on disk, because the pages of a file whose fsync failed may be lost although they look written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _drop_torn_tail(path)
        self._next_seq = 1 + _last_seq(path)
        self._file = self._open()
        self._size = self._synced_size = os.fstat(self._file).st_size
        self._unsynced: list[bytes] = []
        self._is_intact = True
        self._lock = threading.Lock()
        _sync_directory(path.parent)

    @property
    def size(self) -> int:
        """Bytes of the file that is written to."""
        return self._size

    @property
    def last_seq(self) -> int:
        """Number of the newest entry; 0 before the first."""
        return self._next_seq - 1

    @property
    def is_synced(self) -> bool:
        """Whether everything appended is on disk."""
        return not self._unsynced

    def append(self, events: Sequence[Event]) -> None:
        """Number and write events in one piece: all of them or none. They are durable only after `sync`.

        Raises:
            JournalError: they were not written; the file is as it was.
        """
        lines = [sealed(line_of(replace(event, seq=self._next_seq + index))) for index, event in enumerate(events)]
        with self._lock:
            self._mend()
            self._write(b"".join(lines))
            self._unsynced += lines
        self._next_seq += len(lines)

    def sync(self) -> None:
        """Return once everything appended so far is on disk.

        Raises:
            JournalError: it is not; a later call writes it again.
        """
        with self._lock:
            self._mend()
            size, num_lines = self._size, len(self._unsynced)
        if not num_lines:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            self._is_intact = False
            raise JournalError(f"cannot make the journal {self._path} durable: {error.strerror}") from error
        with self._lock:
            self._synced_size = size
            del self._unsynced[:num_lines]

    def rotate(self) -> None:
        """Go on in a new file; what was written so far must be on disk."""
        assert self.is_synced
        with self._lock:
            self._path.rename(self._path.with_name(f"{_ROTATED}{self.last_seq:012}.jsonl"))
            full, self._file = self._file, self._open()
            os.close(full)
            self._size = self._synced_size = 0
        _sync_directory(self._path.parent)

    def abandon(self) -> None:
        """Close without a word: what was appended and not synced may be lost, and has had no effect."""
        os.close(self._file)

    def close(self) -> None:
        """Sync and close; a closed journal takes no more entries."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _write(self, data: bytes) -> None:
        """Write all of it, or leave the file as it was."""
        written, why = 0, f"the disk took only a part; {words(self._path, len(data))}"
        try:
            written = os.write(self._file, data)
        except OSError as error:
            why = (
                words(self._path, len(data))
                if is_full(error)
                else f"{error.strerror or type(error).__name__}; it is tried again"
            )
        if written == len(data):
            self._size += written
            return
        self._is_intact = written == 0
        with contextlib.suppress(JournalError):
            self._cut(self._size)
        raise JournalError(f"cannot write the journal {self._path}: {why}")

    def _mend(self) -> None:
        """After a failure: cut the file to what is known to be on disk, and write the rest again."""
        if self._is_intact:
            return
        self._cut(self._synced_size)
        self._size = self._synced_size
        self._write(b"".join(self._unsynced))

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise JournalError(f"cannot cut the journal {self._path}: {error.strerror}") from error
        self._is_intact = True


def _last_seq(path: Path) -> int:
    """Number of the last entry of a journal whose newest file is `path`; 0 where there is none.

    Raises:
        JournalError: that file is damaged.
    """
    numbers = [entry.get("seq", number) for number, entry in enumerate(read(path) if path.exists() else (), start=1)]
    full = [_last_of_name(each) for each in segments(path.parent)] if path.name == FILE_NAME else []
    return int(numbers[-1]) if numbers else max(full, default=0)


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
