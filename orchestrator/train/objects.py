"""What a checkpoint keeps beside tensors and numbers: any Python objects, pickled, a file for each rank.

Such are the state of schedulers, of an optimizer like LBFGS, and of the user's training. Read only after the manifest
was verified, as unpickling runs code. Called by `checkpoint`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import CheckpointError

FILE = "objects_rank{rank}.pt"


def pickled(kept: Mapping[str, Any]) -> bytes:
    """Objects as torch saves them, nothing for none.

    Raises:
        CheckpointError: one cannot be pickled.
    """
    if not kept:
        return b""
    buffer = io.BytesIO()
    try:
        torch.save(dict(kept), buffer)
    except Exception as error:  # whatever the user's classes raise
        raise CheckpointError(
            f"the state of the training cannot be pickled ({type(error).__name__}: {error}); allowed: what pickle takes"
        ) from error
    return buffer.getvalue()


def read(directory: Path, names: Set[str], rank: int) -> dict[str, Any]:
    """The objects of a rank in a commit that holds files of those names; those of rank 0 where it has none.

    Raises:
        CheckpointError: they cannot be unpickled, such as after a class was renamed.
    """
    name = next((name for name in (FILE.format(rank=rank), FILE.format(rank=0)) if name in names), None)
    if name is None:
        return {}
    try:
        found: dict[str, Any] = torch.load(directory / name, weights_only=False, map_location="cpu")
    except Exception as error:  # whatever the user's classes raise
        raise CheckpointError(
            f"{name} cannot be read ({type(error).__name__}: {error}); allowed: the classes that it was written with"
        ) from error
    return found
