"""Trains many models on few devices: one policy turns device share, batch size and precision of every running trial.

From Python there is `load_run(path)`, which reads the tables of a run, going on or over; the rest is the `orchestrator`
command. Importing the package is cheap: tables, torch and Ray come in when something needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.training_calls import checkpoint, report, trial, watch

if TYPE_CHECKING:
    from orchestrator.telemetry.load import RunTables, load_run

__version__ = "0.1.0"
__all__ = ["RunTables", "__version__", "checkpoint", "load_run", "report", "trial", "watch"]


def __getattr__(name: str) -> object:
    """Import what reads tables when it is first asked for."""
    if name in {"RunTables", "load_run"}:
        from orchestrator.telemetry import load

        return getattr(load, name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}; it has {', '.join(__all__)}")
