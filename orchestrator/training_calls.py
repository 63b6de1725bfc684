"""What a training may call of the orchestrator: `report`, `checkpoint` and `trial`.

In a trial they reach the attempt that runs in this process. Outside of one `report` does nothing and the others return
None, so that the same file runs by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.train.function.current import Running, TrialInfo

_CURRENT = "orchestrator.train.function.current"


def report(metrics: Mapping[str, Any], checkpoint: Path | str | None = None) -> None:
    """Tell the search of results, and wait for its word; in a trial that is stopped this does not return.

    Args:
        metrics: values by name; the search's metric must be a number.
        checkpoint: a directory that holds the state behind them; it is copied.

    Raises:
        FunctionError: the metric of the search is missing, or no number.
    """
    attempt = _running()
    if attempt is not None:
        attempt.report(metrics, None if checkpoint is None else Path(checkpoint))


def trial() -> TrialInfo | None:
    """Who is training: id, run, directory, rank and attempt of the trial; None outside of one."""
    attempt = _running()
    return None if attempt is None else attempt.info


def checkpoint() -> Path | None:
    """The directory with the files of the newest reported checkpoint of this trial; None where there is none."""
    attempt = _running()
    return None if attempt is None else attempt.checkpoint


def _running() -> Running | None:
    """The attempt of this process; a process that never loaded the driver of functions has none."""
    module = sys.modules.get(_CURRENT)
    return None if module is None else module.running()
