"""Reading a folder of data files: which there are, which are held out, and what a broken one does.

A file that cannot be read is named; whether it stops the trial or is left out is the user's choice. Knows no format:
the caller brings the function that reads one file. Called by the loaders of the jobs that read folders.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

STOP, SKIP = "stop", "skip"
"""What a broken file does: end the trial, or be left out with a warning."""

BROKEN = (OSError, ValueError, EOFError, SyntaxError)
"""What reading a broken file raises; SyntaxError is Pillow's."""

_Value = TypeVar("_Value")


def existing_folder(data_dir: str) -> Path:
    """The folder of that name.

    Raises:
        ValueError: it is not there, is no folder, or may not be read.
    """
    root = Path(data_dir)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"data_dir={data_dir!r} {what}; needed: a folder that this process can read")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(f"data_dir={data_dir!r} may not be read by this user; change its permissions")
    return root


def files_below(root: Path, endings: Iterable[str]) -> list[str]:
    """Relative POSIX paths of all files below `root` with one of these endings (lower case, with the dot), sorted.

    Hidden files and folders are left out, links to folders are not followed.
    """
    wanted = tuple(endings)
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        base = Path(folder)
        found += [
            (base / name).relative_to(root).as_posix()
            for name in names
            if not name.startswith(".") and name.lower().endswith(wanted)
        ]
    return sorted(found)


def is_held_out(relative_path: str, per_256: int) -> bool:
    """Whether a file is one of `per_256` in 256 that are held out, by a hash of its relative path."""
    return hashlib.sha256(relative_path.encode(errors="surrogateescape")).digest()[0] < per_256


def read_files(
    root: Path, relative_paths: Iterable[str], read: Callable[[Path], _Value], on_bad_file: str
) -> list[tuple[str, _Value]]:
    """Pairs of a file's relative path and what `read` makes of it, without the broken ones where those are skipped.

    Args:
        root: folder the paths are relative to.
        relative_paths: the files, in the order of the result.
        read: reads one file; an error of `BROKEN` from it means a broken file.
        on_bad_file: 'stop' or 'skip'.

    Raises:
        ValueError: a broken file and `on_bad_file` is 'stop'; the message names it.
    """
    found, bad = [], []
    for relative_path in relative_paths:
        try:
            found.append((relative_path, read(root / relative_path)))
        except BROKEN as error:
            if on_bad_file != SKIP:
                raise broken_file(root / relative_path, error) from error
            logger.warning("left out %s: %s", root / relative_path, _reason(error))
            bad.append(relative_path)
    if bad:
        logger.warning("%d of %d files below %s left out as broken", len(bad), len(bad) + len(found), root)
    return found


def broken_file(path: Path, error: Exception) -> ValueError:
    """The message that names a broken file and says what to do."""
    return ValueError(
        f"{path} cannot be read: {_reason(error)}; repair or remove it, or leave out such files with on_bad_file=skip"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
