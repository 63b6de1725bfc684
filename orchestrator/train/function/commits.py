"""Checkpoints of a user's function: kept as they are, in commits like those of declared trainings.

A commit is `checkpoints/step-<n>` with the function's files and a manifest of their sizes and SHA-256, so that `verify`
and `resume` treat it like any other. The newest `KEEP_COMMITS` are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.train import checkpoint, manifest


def commit(directory: Path, source: Path, extra: Mapping[str, Any]) -> Path:
    """Copy the files below `source` into a new commit `<directory>/step-<n>`; returns when it is durable.

    Args:
        directory: the trial's `checkpoints`.
        source: the folder or file that the function handed over; left as it is.
        extra: JSON-able; holds `step`.

    Raises:
        CheckpointError: it could not be written; nothing was committed then.
    """
    return checkpoint.commit_files(directory, source, extra)


def extra_of(path: Path) -> dict[str, Any]:
    """What a commit was made with, or the newest whole one before it where it is damaged.

    Raises:
        DamagedError: neither is as it was written.
    """
    return dict(checkpoint.newest_whole(path)[1].extra)


def take_out(path: Path, target: Path) -> Path:
    """A copy of the files of the commit that `extra_of` speaks of, for the function to read and even to change."""
    path, _ = checkpoint.newest_whole(path)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(path, target, ignore=shutil.ignore_patterns(manifest.MANIFEST_NAME))
    return target
