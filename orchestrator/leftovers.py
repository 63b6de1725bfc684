"""What a killed run leaves on its host: its cluster's temporary directory, and processes that go on for a while.

A directory says who owns it, by host, boot, process and its start. Only what belongs to a process of this host that is
provably dead is removed; what another host or nobody is known to own is left alone. Called when a run starts, and by
`orchestrator clean`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.host import make_temporary, temporary_places
from orchestrator.processes import Life, Owner, kill, still_there, with_environment, with_title_and_file_below

PREFIX = "orch-"
_OWNER_FILE = "owner.json"
_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """The temporary directory of one run's cluster.

    Attributes:
        directory: where it is.
        run_dir: of the run it was made for; empty where nothing says so.
        life: of the process that made it.
        pids: of processes that still belong to it.
    """

    directory: Path
    run_dir: str
    life: Life
    pids: tuple[int, ...]

    def __str__(self) -> str:
        """What it is, in one line."""
        count = len(self.pids)
        processes = f" and {count} process{'es' if count != 1 else ''}" if count else ""
        return f"{self.directory}{processes} of {self.run_dir or 'an unknown run'}"


def make_home(run_dir: Path) -> Path:
    """A temporary directory for the cluster of a run, marked as this process's.

    Raises:
        OSError: there is no place for it; the message says what was tried.
    """
    home = make_temporary(PREFIX)
    (home / _OWNER_FILE).write_text(Owner.this().record(run_dir=str(run_dir)), encoding="utf-8")
    return home


def processes_of(home: Path) -> set[int]:
    """Processes of the cluster in that directory, whoever their parent is now."""
    # Ray's agents give themselves a title, which overwrites the beginning of the environment that the kernel shows.
    return with_environment("RAY_TMPDIR", str(home)) | with_title_and_file_below("ray::", home)


def remove_home(home: Path) -> int:
    """End what still runs there, and remove it; returns how many processes could not be ended."""
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while (left := processes_of(home)) and time.monotonic() < deadline_s:
        kill(left)  # and look once more: one of them may have started another meanwhile
        still_there(left, deadline_s - time.monotonic())
    with contextlib.suppress(OSError):
        for path in home.iterdir():
            if path.name != _OWNER_FILE:  # last: what cannot be removed now is known to be ours the next time
                shutil.rmtree(path, ignore_errors=True)
    if not left:
        shutil.rmtree(home, ignore_errors=True)
    return len(left)


def find(places: Iterable[Path] | None = None) -> list[Leftover]:
    """Every such directory of this user, those of runs that go on included; oldest first."""
    found = []
    for place in dict.fromkeys(temporary_places() if places is None else places):
        with contextlib.suppress(OSError):
            found += [path for path in place.glob(f"{PREFIX}*") if _is_ours(path)]
    return [_leftover(path) for path in sorted(found, key=_age)]


def sweep(places: Iterable[Path] | None = None) -> list[Leftover]:
    """Remove what belongs to dead runs of this host, and end its processes; returns what that was."""
    dead = [leftover for leftover in find(places) if leftover.life is Life.DEAD]
    for leftover in dead:
        remove_home(leftover.directory)
    return dead


def _is_ours(path: Path) -> bool:
    """Whether it is a real directory of this user: a link could lead anywhere."""
    return not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.getuid()


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _leftover(path: Path) -> Leftover:
    try:
        text = (path / _OWNER_FILE).read_text(encoding="utf-8")
        run_dir = str(json.loads(text).get("run_dir", ""))
    except (OSError, ValueError, AttributeError):
        text, run_dir = "", ""
    owner = Owner.parse(text)
    life = Life.UNKNOWN if owner is None else owner.life
    pids = tuple(sorted(processes_of(path))) if life is not Life.ALIVE else ()
    return Leftover(directory=path, run_dir=run_dir, life=life, pids=pids)
