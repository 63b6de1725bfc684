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


def newest_whole(path: Path) -> tuple[Path, dict[str, Any]]:
    """The commit in `path`, or the newest before it whose files are as they were written; and what it was made with.

    Raises:
        CheckpointError: there is none.
    """
    found, record = checkpoint.newest_whole(path)
    return found, dict(record.extra)


def take_out(path: Path, target: Path) -> Path:
    """A copy of a commit's own files, without the manifest, for the function to read and even to change."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(path, target, ignore=shutil.ignore_patterns(manifest.MANIFEST_NAME))
    return target
