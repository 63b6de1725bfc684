"""Trains many models on few devices: one policy turns device share, batch size and precision of every running trial.

From Python: `run` makes a run and waits for it, `Run` and `load_run` read one. In a training: `report`, `checkpoint`,
`num_reports`, `trial` and `watch`. Importing the package is cheap: tables, torch and Ray come in when something needs
them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from orchestrator.training_calls import checkpoint, num_reports, report, trial, watch

if TYPE_CHECKING:
    from orchestrator.api import Run, run
    from orchestrator.telemetry.load import RunTables, load_run

__version__ = "0.1.0"
__all__ = [
    "Run",
    "RunTables",
    "__version__",
    "checkpoint",
    "load_run",
    "num_reports",
    "report",
    "run",
    "trial",
    "watch",
]

_FROM = {"Run": "api", "run": "api", "RunTables": "telemetry.load", "load_run": "telemetry.load"}


def __getattr__(name: str) -> object:
    """Import what runs and reads runs when it is first asked for."""
    if name in _FROM:
        return getattr(import_module(f"orchestrator.{_FROM[name]}"), name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}; it has {', '.join(__all__)}")
