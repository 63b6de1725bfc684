"""`load_run`: everything a run recorded, as Arrow tables, while it goes on, after its end or after a crash.

Reads the telemetry files, the journal and the status file; writes nothing and needs neither torch nor Ray. For people
in notebooks and for `verify`; nothing of a live run depends on it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from orchestrator.control.events import (
    GainRealised,
    PlanCommitted,
    Reported,
    RunEnded,
    TrialAssigned,
    TrialContinued,
    TrialEnded,
    TrialPaused,
    TrialQueued,
    TrialRequeued,
)
from orchestrator.control.joint import part_of
from orchestrator.control.journal import History, read_history
from orchestrator.errors import ConfigError
from orchestrator.policies.codec import plan_from
from orchestrator.policies.plan import TrialId
from orchestrator.run_dirs import read_status
from orchestrator.telemetry.store import read_table
from orchestrator.telemetry.tables import TableKind

if TYPE_CHECKING:
    import pandas as pd

_TRIAL_COLUMNS = pa.schema(
    [
        ("trial_id", pa.utf8()),
        ("index", pa.int64()),
        ("state", pa.utf8()),
        ("attempt", pa.int64()),
        ("step", pa.int64()),
        ("num_samples", pa.int64()),
        ("target_samples", pa.int64()),
        ("loss", pa.float64()),
        ("metric_value", pa.float64()),
        ("throughput_per_s", pa.float64()),
        ("share", pa.float64()),
        ("micro_batch", pa.int64()),
        ("grad_accum", pa.int64()),
        ("global_batch", pa.int64()),
        ("num_workers", pa.int64()),
        ("tier", pa.utf8()),
        ("enforced_by", pa.utf8()),
        ("slot_id", pa.utf8()),
        ("error", pa.utf8()),
        ("log_path", pa.utf8()),
    ]
)
_PLAN_COLUMNS = pa.schema(
    [
        ("generation", pa.int64()),
        ("t_s", pa.float64()),
        ("trial_id", pa.utf8()),
        ("share", pa.float64()),
        ("micro_batch", pa.int64()),
        ("grad_accum", pa.int64()),
        ("tier", pa.utf8()),
        ("num_workers", pa.int64()),
        ("effect", pa.utf8()),
        ("reason", pa.utf8()),
        ("binding", pa.utf8()),
        ("predicted_goodput", pa.float64()),
        ("predicted_gain", pa.float64()),
        ("realised_gain", pa.float64()),
        ("resize_to", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTables:
    """The tables of one run, as they were when `load_run` read them.

    Attributes:
        path: the run directory.
        state: of the run: starting, running, stopping, done, failed or interrupted; unknown when nothing says so.
        steps: one row per optimizer step and rank.
        devices: one row per device and sample.
        results: one row per report of a trial; each metric has a column `metric.NAME`.
        trials: one row per trial; each parameter has a column `param.NAME`.
        plans: one row per decision and trial.
        notes: what could not be read, one sentence each; empty in a healthy run.
    """

    path: Path
    state: str
    steps: pa.Table
    devices: pa.Table
    results: pa.Table
    trials: pa.Table
    plans: pa.Table
    notes: tuple[str, ...]

    def to_pandas(self, name: str) -> pd.DataFrame:
        """One of the tables as a data frame.

        Raises:
            ConfigError: there is no table of that name.
        """
        if name not in _TABLES:
            raise ConfigError(f"a run has no table {name!r}; allowed: {', '.join(_TABLES)}")
        frame: pd.DataFrame = getattr(self, name).to_pandas()
        return frame

    def _repr_html_(self) -> str:
        """The trials and the size of each table, for a notebook."""
        sizes = ", ".join(f"{name}: {getattr(self, name).num_rows} rows" for name in _TABLES)
        columns = [name for name in _SHOWN if name in self.trials.column_names]
        columns += [name for name in self.trials.column_names if name.startswith("param.")]
        rows = self.trials.select(columns).to_pylist()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join("<tr>" + "".join(f"<td>{_cell(row[name])}</td>" for name in columns) + "</tr>" for row in rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<p><b>{html.escape(self.path.name)}</b> ({html.escape(self.state)}): {sizes}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            + (f"<ul>{notes}</ul>" if notes else "")
        )


_TABLES = ("steps", "devices", "results", "trials", "plans")
_SHOWN = ("trial_id", "state", "step", "loss", "metric_value", "throughput_per_s", "share", "tier")


def load_run(path: str | Path) -> RunTables:
    """Read everything a run recorded so far.

    Args:
        path: the run directory, as printed on the last line of a run.

    Raises:
        ConfigError: the directory is no run.
        TelemetryError: it was written by a newer version.
    """
    run_dir = Path(path)
    return tables_of(run_dir, read_history(run_dir), read_status(run_dir) or {})


def tables_of(run_dir: Path, history: History, status: Mapping[str, Any]) -> RunTables:
    """The same, with a journal and a status that were read already.

    Raises:
        TelemetryError: a newer version wrote the telemetry.
    """
    reads = {kind: read_table(run_dir / "telemetry", kind) for kind in TableKind}
    notes = [*history.damage]
    if history.torn_tail_bytes:
        notes.append(f"the last line of the journal is torn ({history.torn_tail_bytes} bytes)")
    for read in reads.values():
        notes.extend(read.notes)
    return RunTables(
        path=run_dir,
        state=_state(history, status),
        steps=reads[TableKind.STEPS].table,
        devices=reads[TableKind.DEVICES].table,
        results=_with_metric_columns(reads[TableKind.RESULTS].table),
        trials=_trials(history, status),
        plans=_plans(history, notes),
        notes=tuple(notes),
    )


def _state(history: History, status: Mapping[str, Any]) -> str:
    ended = list(history.of(RunEnded))
    if ended and history.entries[-1] is ended[-1]:
        return ended[-1].state
    return str(status.get("state", "unknown"))


def _with_metric_columns(table: pa.Table) -> pa.Table:
    """Replace the map of metrics by one column of numbers per metric."""
    rows = [dict(pairs or ()) for pairs in table["metrics"].to_pylist()]
    plain = table.drop_columns(["metrics"])
    for name in sorted({name for row in rows for name in row}):
        plain = plain.append_column(f"metric.{name}", pa.array([row.get(name) for row in rows], pa.float64()))
    return plain


def _trials(history: History, status: Mapping[str, Any]) -> pa.Table:
    """One row per trial: the journal says which there are and how they ended, the status file the rest."""
    rows: dict[TrialId, dict[str, Any]] = {}
    params: dict[TrialId, Mapping[str, Any]] = {}
    for entry in history.entries:
        if isinstance(entry, TrialQueued):
            rows[entry.trial_id] = {"trial_id": entry.trial_id, "index": len(rows), "state": "queued"}
            params[entry.trial_id] = entry.params
        elif isinstance(entry, TrialContinued):
            rows[entry.trial_id] |= {"state": "queued", "attempt": entry.attempt}
            params[entry.trial_id] = entry.params
        elif isinstance(entry, TrialAssigned | TrialRequeued | TrialPaused | Reported | TrialEnded):
            rows.setdefault(entry.trial_id, {"trial_id": entry.trial_id}).update(_news(entry))
    for trial in _dicts(status.get("trials")):
        trial_id = TrialId(str(trial.get("trial_id")))
        if trial_id not in rows:
            continue
        journalled = rows[trial_id]
        is_final = journalled.get("state") in {"done", "stopped", "failed"}
        rows[trial_id] = {**trial, **journalled} if is_final else {**journalled, **trial}
    table = pa.Table.from_pylist(
        [{name: _fitting(row.get(name), kind) for name, kind in _COLUMN_KINDS.items()} for row in rows.values()],
        schema=_TRIAL_COLUMNS,
    )
    for name in sorted({name for values in params.values() for name in values}):
        table = table.append_column(f"param.{name}", _column([params.get(key, {}).get(name) for key in rows]))
    return table


def _news(entry: TrialAssigned | TrialRequeued | TrialPaused | Reported | TrialEnded) -> dict[str, Any]:
    """What a journal entry says of a trial."""
    if isinstance(entry, TrialAssigned):
        return {"state": "running", "attempt": entry.attempt, "slot_id": entry.slot_id}
    if isinstance(entry, TrialRequeued | TrialPaused):
        return {"state": "paused" if isinstance(entry, TrialPaused) else "queued", "attempt": entry.attempt}
    news: dict[str, Any] = {"step": entry.step, "num_samples": entry.num_samples}
    if isinstance(entry, TrialEnded):
        news |= {"state": entry.state} | ({"error": entry.reason} if entry.state == "failed" else {})
    return news


def _plans(history: History, notes: list[str]) -> pa.Table:
    gains = {(gain.generation, gain.trial_id): gain.realised for gain in history.of(GainRealised)}
    rows: list[dict[str, Any]] = []
    for entry in history.of(PlanCommitted):
        try:
            plan = part_of(plan_from(entry.plan), entry.prefix)  # without its snapshot, which takes longest
        except ValueError as error:
            notes.append(f"the plan of generation {entry.generation} cannot be read: {error}")
            continue
        for allocation in plan.allocations:
            settings = allocation.settings
            rows.append(
                {
                    "generation": entry.generation,
                    "t_s": entry.t_s,
                    "trial_id": allocation.trial_id,
                    "share": settings.share,
                    "micro_batch": settings.micro_batch,
                    "grad_accum": settings.grad_accum,
                    "tier": settings.tier.value,
                    "num_workers": settings.num_workers,
                    "effect": allocation.effect.value,
                    "reason": allocation.reason,
                    "binding": allocation.binding,
                    "predicted_goodput": allocation.predicted_goodput,
                    "predicted_gain": allocation.predicted_gain,
                    "realised_gain": gains.get((entry.generation, allocation.trial_id)),
                    "resize_to": allocation.resize_to,
                }
            )
    return pa.Table.from_pylist(rows, schema=_PLAN_COLUMNS)


_COLUMN_KINDS: dict[str, type] = {
    field.name: str if pa.types.is_string(field.type) else float if pa.types.is_floating(field.type) else int
    for field in _TRIAL_COLUMNS
}


def _fitting(value: object, kind: type) -> object:
    """A status value as its column wants it; one of another type becomes null, since the file is not ours alone."""
    if value is None or isinstance(value, bool):
        return None
    if kind is str:
        return str(value)
    if not isinstance(value, int | float):
        return None
    return float(value) if kind is float else int(value) if float(value).is_integer() else None


def _column(values: Sequence[object]) -> pa.Array:
    """Numbers, texts or truth values as they are; anything mixed or nested as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(str(value)) for value in values], pa.float64())
    if kinds in ({int}, {float}, {str}, {bool}):
        with suppress(OverflowError):  # an integer beyond 64 bits
            return pa.array(list(values))
    texts = [None if value is None else json.dumps(value, sort_keys=True, default=str) for value in values]
    return pa.array(texts, pa.utf8())


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _cell(value: object) -> str:
    return "" if value is None else html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
