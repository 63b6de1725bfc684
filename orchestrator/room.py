"""Whether there is room on a disk, how much is missing, and the words for it.

A disk that is full is no error of a trial or of a run: whoever has to write waits until there is room. Knows files and
numbers only; used by whatever writes what must not be lost.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 1.0
"""Between two looks whether there is room again."""
_LOOK_S = 0.2
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_PROBE_BYTES = 1 << 16


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that the disk or the user's quota is full."""
    return any(isinstance(each, OSError) and each.errno in _FULL for each in _chain(error))


def has_room(directory: Path, needed_bytes: int = 0) -> bool:
    """Whether so much can be written below a directory; tries a small file, because a quota is seen in no other way."""
    place = existing(directory)
    probe = place / f".room-{uuid.uuid4().hex[:12]}"
    try:
        if free_bytes(place) < needed_bytes:
            return False
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        return not is_full(error)
    finally:
        probe.unlink(missing_ok=True)
    return True


def wait(directory: Path, needed_bytes: int, tell: Callable[[str], None], is_cancelled: Callable[[], bool]) -> bool:
    """Return once there is room, after one word where there is none yet; False where it was called off before."""
    is_told = False
    while not has_room(directory, needed_bytes):
        if is_cancelled():
            return False
        if not is_told:
            tell(words(directory, needed_bytes))
        is_told = True
        time.sleep(_LOOK_S)
    return True


def existing(path: Path) -> Path:
    """The nearest directory that is there, from a path upwards."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write there, quotas not counted."""
    return shutil.disk_usage(directory).free if os.geteuid() == 0 else _available(directory)


def _available(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def words(path: Path, needed_bytes: int | None = None) -> str:
    """What to tell of a full disk: where, what is needed, what is free."""
    needed = "" if needed_bytes is None else f"needs {size(needed_bytes)}, "
    try:
        free = f"{size(free_bytes(existing(path)))} free"
    except OSError:
        free = "how much is free is not known"
    return f"no room on the disk: {path} {needed}{free}; free some, it goes on by itself"


def size(num_bytes: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it was raised from, or while."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        pending += [each.__cause__, each.__context__]
        # torch's distributed checkpoint keeps what each rank raised, with its stack.
        failures = getattr(each, "failures", None)
        if isinstance(failures, dict):
            pending += [part[0] for part in failures.values() if isinstance(part, tuple) and part]
