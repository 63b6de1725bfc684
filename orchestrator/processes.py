"""Which process owns something on this host, whether that process still lives, and how a tree of processes is ended.

Reads `/proc` only. Knows no run and no Ray. Used by the driver, the lock of a run directory and the sweep of leftovers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_POLL_S = 0.05
_MAX_RECORD_CHARACTERS = 4096


class Life(StrEnum):
    """What is known of a process: `unknown` where it belongs to another host, or nothing says which host it was."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that no other process of any host or boot can be mistaken for.

    Attributes:
        host: name of the host.
        machine_id: what the operating system calls the machine; empty where it has no such id.
        boot_id: different after each boot.
        pid_namespace: process ids of two containers of one host mean nothing to each other.
        pid: process id.
        start_ticks: when it began, in clock ticks since the boot; a process id is given out again, this pair is not.
    """

    host: str
    machine_id: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    @classmethod
    def this(cls) -> Owner:
        """The calling process."""
        pid = os.getpid()
        return cls(**_place(), pid=pid, start_ticks=start_ticks(pid) or 0)

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner in a record, None where the text is no record."""
        try:
            fields = json.loads(text[:_MAX_RECORD_CHARACTERS])
            words = {name: str(fields[name]) for name in ("host", "machine_id", "boot_id", "pid_namespace")}
            return cls(**words, pid=int(fields["pid"]), start_ticks=int(fields["start_ticks"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def record(self, **more: str) -> str:
        """The owner as one line of JSON; `more` are further fields that `parse` leaves out."""
        return json.dumps(asdict(self) | more, sort_keys=True)

    @property
    def life(self) -> Life:
        """Whether it lives. Another host's process is never judged; one of an earlier boot of this host is dead."""
        here = _place()
        if self.host != here["host"] or self.machine_id != here["machine_id"]:
            return Life.UNKNOWN
        if self.boot_id != here["boot_id"]:
            # Without a machine id, two hosts of the same name could not be told apart.
            return Life.DEAD if self.machine_id else Life.UNKNOWN
        if self.pid_namespace != here["pid_namespace"]:
            return Life.UNKNOWN
        return Life.ALIVE if start_ticks(self.pid) == self.start_ticks else Life.DEAD


@cache
def _place() -> dict[str, str]:
    """The fields of `Owner` that say where this process is."""
    try:
        pid_namespace = str((_PROC / "self" / "ns" / "pid").readlink())
    except OSError:
        pid_namespace = ""
    return {
        "host": socket.gethostname(),
        "machine_id": _first_line(Path("/etc/machine-id")),
        "boot_id": _first_line(_PROC / "sys" / "kernel" / "random" / "boot_id"),
        "pid_namespace": pid_namespace,
    }


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where there is none, or only its exit code is left."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    # The second field is the command in brackets and may hold anything, brackets and spaces included.
    fields = text.rpartition(")")[2].split()
    return None if not fields or fields[0] in {"Z", "X"} else int(fields[19])


def descendants() -> set[int]:
    """Ids of all processes below this one."""
    parents: dict[int, int] = {}
    for pid in _all_pids():
        try:
            fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields and fields[0] not in {"Z", "X"}:
            parents[pid] = int(fields[1])
    found: set[int] = set()
    front = {os.getpid()}
    while front:
        front = {pid for pid, parent in parents.items() if parent in front} - found
        found |= front
    return found


def with_environment(name: str, value: str) -> set[int]:
    """Ids of this user's processes whose environment has that variable, whoever their parent is now."""
    wanted = f"{name}={value}".encode()
    found = set()
    for pid in _all_pids():
        try:
            variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables and pid != os.getpid() and start_ticks(pid) is not None:
            found.add(pid)
    return found


def with_title_and_file_below(title: str, directory: Path) -> set[int]:
    """Ids of this user's processes whose command begins so and that have a file open below that directory."""
    begin, place, found = title.encode(), f"{directory}/", set()
    for pid in _all_pids():
        try:
            is_named_so = (_PROC / str(pid) / "cmdline").read_bytes().startswith(begin)
        except OSError:
            continue
        if is_named_so and pid != os.getpid() and any(path.startswith(place) for path in _open_files(pid)):
            found.add(pid)
    return found


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for link in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                yield str(link.readlink())


def _all_pids() -> Iterator[int]:
    return (int(path.name) for path in _PROC.iterdir() if path.name.isdigit())


def kill(pids: Iterable[int]) -> None:
    """End these processes at once; those that are gone already, or another's, are left alone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def still_there(pids: Iterable[int], timeout_s: float) -> set[int]:
    """Those of these processes that have not ended within that time."""
    left = {pid: began for pid in pids if (began := start_ticks(pid)) is not None}
    deadline_s = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        left = {pid: began for pid, began in left.items() if start_ticks(pid) == began}
    return set(left)
