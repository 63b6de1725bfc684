"""Commits of a user's function: the checkpoints that it reports, and the state of the model that it watches.

A commit is `checkpoints/step-<n>` with the function's files as they are, `watched.pt` where a model is watched, and a
manifest of their sizes and SHA-256, so that `verify` and `resume` treat it like any other. The newest `KEEP_COMMITS`
and the best are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.train import checkpoint, manifest
from orchestrator.train.function.watched import FILE, Watched

RESUMED = "resumed"
"""Where a function finds the files of its newest checkpoint, below its trial's directory; other ranks add a number."""

CHECKPOINTS = "checkpoints"
"""The folder of the commits, below the trial's directory."""


class Commits:
    """The commits of one attempt, on one rank; rank 0 writes them.

    Args:
        directory: the trial's own.
        rank: of this process.

    Attributes:
        checkpoint: a copy of the function's files that it goes on from, None where there are none.
        watched: the watched state that an attempt goes on from, None where there is none.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank
        self.checkpoint: Path | None = None
        self.watched: Path | None = None

    def resume(self, path: Path) -> dict[str, Any]:
        """Take up a commit, or the newest whole one before it; what it was made with.

        Raises:
            DamagedError: there is none that is whole.
        """
        path, record = checkpoint.newest_whole(path)
        extra = dict(record.extra)
        if extra.get("has_files", True):
            name = f"{RESUMED}-{self._rank}" if self._rank else RESUMED
            self.checkpoint = take_out(path, self._directory / name)
        self.watched = path / FILE if (path / FILE).exists() else None
        return extra

    def commit(self, source: Path | None, watched: Watched | None, extra: Mapping[str, Any]) -> Path | None:
        """Keep what a report brought and the watched state behind it; None where there is neither, or on other ranks.

        Raises:
            CheckpointError: it could not be written.
        """
        keeps = watched is not None and watched.is_whole
        if self._rank or (source is None and not keeps):
            return None
        extra = {**extra, "kind": "function", "has_files": source is not None}
        return commit(self._directory / CHECKPOINTS, source, extra, watched if keeps else None)


def commit(directory: Path, source: Path | None, extra: Mapping[str, Any], watched: Watched | None = None) -> Path:
    """Copy the files below `source` into a new commit `<directory>/step-<n>`; returns when it is durable.

    Args:
        directory: the trial's `checkpoints`.
        source: the folder or file that the function handed over, which is left as it is; None for none.
        extra: JSON-able; holds `step`.
        watched: the model whose state is kept as well.

    Raises:
        CheckpointError: it could not be written; nothing was committed then.
    """

    def write(draft: Path) -> None:
        if source is not None and source.is_dir():
            shutil.copytree(source, draft, dirs_exist_ok=True)
        elif source is not None:
            shutil.copy2(source, draft)
        if watched is not None:
            watched.save(draft)

    num_bytes = (0 if source is None else _size_of(source)) + (0 if watched is None else watched.num_bytes)
    return checkpoint.commit_files(directory, write, extra, num_bytes)


def _size_of(source: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = source.rglob("*") if source.is_dir() else [source]
    return sum(path.stat().st_size for path in files if path.is_file())


def take_out(path: Path, target: Path) -> Path:
    """A copy of a commit's own files, without what was added to them, for the function to read and even to change."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(path, target, ignore=shutil.ignore_patterns(manifest.MANIFEST_NAME, FILE))
    return target
