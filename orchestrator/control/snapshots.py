"""The world as a file, so that an actor which lived for weeks recovers in seconds: a cache of what the journal says.

A snapshot holds the world behind one entry of the journal. It is used only if it is exactly what was written, by this
very code and for this very run; otherwise it is passed over and the whole journal is applied. Called by `engine`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from functools import cache
from pathlib import Path

from orchestrator.control.spec import RunSpec
from orchestrator.control.world import World

logger = logging.getLogger(__name__)

FILE_NAME = "journal.snapshot"
_PACKAGES = ("control", "policies", "share", "telemetry")
"""Where the classes of the values in a world are."""


def save(world: World, spec: RunSpec, seq: int) -> None:
    """Write the world behind entry `seq` of a run's journal.

    Raises:
        OSError: it cannot be written.
    """
    body = pickle.dumps((spec, world), protocol=5)
    head = {"seq": seq, "sha256": hashlib.sha256(body).hexdigest(), "code": code_version()}
    path = Path(spec.run_dir) / FILE_NAME
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def load(spec: RunSpec) -> tuple[World, int] | None:
    """The newest world of a run and the number of the entry behind which it is; None where none can be used."""
    path = Path(spec.run_dir) / FILE_NAME
    try:
        line, _, body = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        is_whole = hashlib.sha256(body).hexdigest() == head["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the snapshot %s cannot be read (%s); the whole journal is applied", path, error)
        return None
    if not is_whole or head["code"] != code_version():
        why = "of another version" if is_whole else "damaged"
        logger.warning("the snapshot %s is %s; the whole journal is applied", path, why)
        return None
    known, world = pickle.loads(body)  # ours: written into the run's own directory, and what was written
    if known != spec:
        logger.warning("the run has moved or was changed; the whole journal is applied")
        return None
    return world, int(head["seq"])


@cache
def code_version() -> str:
    """Checksum of the code that the values in a world, and messages to a policy actor, depend on."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()
