"""Whether a run directory may be believed: nobody but this user can have written what is read back from it.

A checkpoint's metadata, a snapshot of the world, Ray Tune's state and a shipped function are pickles, and a pickle can
run any code. Their checksums guard against damage, not against somebody who writes both. So before a run goes on, or a
model is exported, its directory must be this user's and closed to the others. Reads owners and modes only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import ConfigError

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_REACHABLE = stat.S_IXGRP | stat.S_IXOTH


def require_trusted(run_dir: Path, *, is_trusted: bool = False) -> None:
    """Refuse a run directory in which others can have written.

    Args:
        run_dir: the run's.
        is_trusted: the user says that it is all right, as where owners mean nothing.

    Raises:
        ConfigError: something in it belongs to another user, or others may write it.
    """
    if is_trusted:
        return
    for path, why in _doubts(run_dir):
        raise ConfigError(
            f"{path} {why}: what is read back from there can run code as you, and is not read; allowed: a run directory"
            f" that is yours and that nobody else can write (chown, chmod go-w {run_dir}), or --trust-storage where you"
            " know who wrote it and owners mean nothing"
        )


def _doubts(run_dir: Path) -> Iterator[tuple[Path, str]]:
    """What others can have written, and why; the directory itself first."""
    own, top = os.geteuid(), run_dir.stat()
    if top.st_uid != own:
        yield run_dir, f"belongs to user {top.st_uid}, not to you ({own})"
    if top.st_mode & _WRITABLE:
        yield run_dir, f"may be written by others (mode {stat.S_IMODE(top.st_mode):04o})"
    is_reachable = bool(top.st_mode & _REACHABLE)  # otherwise nobody else comes as far as what is in it
    for folder, names, files in os.walk(run_dir):
        for name in (*names, *files):
            path = Path(folder, name)
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if found.st_uid != own:
                yield path, f"belongs to user {found.st_uid}, not to you ({own})"
            if is_reachable and not stat.S_ISLNK(found.st_mode) and found.st_mode & _WRITABLE:
                yield path, f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
