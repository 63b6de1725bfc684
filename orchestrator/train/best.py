"""The best commit of a trial, by the metric of the search: a note beside its commits, which keeps it from removal.

`checkpoints/best.json` names the commit and its value. Written when a better report was made, after its commit is
durable; read by what removes old commits, and by `export`. Knows no tensors.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.names import write_atomically

FILE_NAME = "best.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best report of a trial that has a commit.

    Attributes:
        commit: name of its directory.
        step: optimizer steps in it.
        metric: name of the value.
        value: the value, finite.
    """

    commit: str
    step: int
    metric: str
    value: float


def read(directory: Path) -> Best | None:
    """The note in a directory of commits; None where there is none, or none that can be read."""
    try:
        return Best(**json.loads((directory / FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def note(directory: Path, found: Best, mode: str) -> bool:
    """Keep `found` if it is better than what is noted; whether it is."""
    if not math.isfinite(found.value):
        return False
    before = read(directory)
    if before is not None and before.metric == found.metric and (directory / before.commit).is_dir():
        sign = -1.0 if mode == "max" else 1.0
        if sign * found.value >= sign * before.value:
            return False
    try:
        write_atomically(directory / FILE_NAME, json.dumps(asdict(found)))
    except OSError as error:
        logger.warning("the best commit could not be noted: %s", error)
        return False
    return True
