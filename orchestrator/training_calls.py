"""What a training may call of the orchestrator: `report`, `checkpoint`, `num_reports`, `trial` and `watch`.

In a trial they reach the attempt that runs in this process. Outside of one `report` and `watch` do nothing,
`num_reports` returns 0 and the others None, so that the same file runs by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from orchestrator.train.function.current import Running, TrialInfo

_CURRENT = "orchestrator.train.function.current"

Model = TypeVar("Model")


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


def watch(model: Model, optimizer: Optimizer | None = None, loader: DataLoader[Any] | None = None) -> Model:
    """Let the orchestrator see the model that is trained, which gives the function more; returns the model itself.

    Called once it is on its device, in front of the first step. From there on

    - the state of the model, its optimizer and the random generators is kept with each report. After an interruption or
      a pause it is that of the newest report again when this returns, and `num_reports` says where the loop goes on:
      `for epoch in range(orchestrator.num_reports(), 10)` where each epoch ends with a report.
    - cheaper precision tiers are probed: the model computes some of its inputs again, and the gradients that arrived at
      its outputs, in a cheaper tier and in the dearest one. A tier is used once its gradients are as good, weights that
      it spoils all the same are put back, and linear layers may compute in fp8, int8 or fixed point as well.

    Args:
        model: the `torch.nn.Module` whose optimizer steps first; it may be wrapped in DistributedDataParallel.
        optimizer: of that model's parameters; None for the first one that steps them.
        loader: the DataLoader that is trained from; None for the one that yields batches between steps.

    Raises:
        FunctionError: it is no module, another model is watched already, or the optimizer has other parameters.
    """
    attempt = _running()
    if attempt is not None:
        attempt.watch(model, optimizer, loader)
    return model


def trial() -> TrialInfo | None:
    """Who is training: id, run, directory, rank and attempt of the trial; None outside of one."""
    attempt = _running()
    return None if attempt is None else attempt.info


def num_reports() -> int:
    """Reports of this trial that are behind it, with whose state it goes on; 0 at its beginning and outside of one."""
    attempt = _running()
    return 0 if attempt is None else attempt.num_reports


def checkpoint() -> Path | None:
    """The directory with the files of the newest reported checkpoint of this trial; None where there is none."""
    attempt = _running()
    return None if attempt is None else attempt.checkpoint


def _running() -> Running | None:
    """The attempt of this process; a process that never loaded the driver of functions has none."""
    module = sys.modules.get(_CURRENT)
    return None if module is None else module.running()
