"""Whether the evidence is all there: tables, journal and checkpoints as they were when the run ended, and as it tells.

Two looks that do not depend on each other: at the sums that the driver wrote with its last word, and at what the
journal says must be in the tables and on disk. Nothing is unpickled. Called by `view.verify`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchestrator import evidence
from orchestrator.control.events import Recovered, Reported, TrialContinued, TrialEnded
from orchestrator.control.journal import History
from orchestrator.errors import CheckpointError
from orchestrator.run_dirs import BEGUN_FILE
from orchestrator.telemetry.record import num_steps_of
from orchestrator.train import manifest
from orchestrator.view.finding import Code, Finding
from orchestrator.view.verify_steps import Attempt

_FLUSH_S = 5.0
"""Rows that the policy actor took this long before it died may have died with it."""
_MAX_NAMED = 3


def recorded(run_dir: Path, *, has_ended: bool, notes: list[str]) -> Iterator[Finding]:
    """Files that are not as they were when the run ended."""
    if not evidence.is_recorded(run_dir):
        if has_ended and run_dir.joinpath(*BEGUN_FILE).exists():
            text = f"{'/'.join(evidence.FILE)} is missing: whether files are as the run left them is not known"
            yield Finding(code=Code.EVIDENCE_MISSING, text=text)
        return
    try:
        found = list(evidence.differences(run_dir))
    except ValueError as error:
        yield Finding(code=Code.EVIDENCE_ALTERED, text=str(error))
        return
    if not has_ended:
        notes.append("the run's status does not say that it ended, although its last word is there")
    for difference in found:
        is_gone = difference.fault is evidence.Fault.MISSING
        yield Finding(code=Code.EVIDENCE_MISSING if is_gone else Code.EVIDENCE_ALTERED, text=str(difference))


def unreadable(notes: Sequence[str]) -> Iterator[Finding]:
    """Finished tables that cannot be read. A crash leaves none: they are renamed into place when they are whole."""
    for note in notes:
        if ".parquet:" in note:
            yield Finding(code=Code.EVIDENCE_ALTERED, text=f"the table {note}")


def missing_steps(history: History, attempts: Sequence[Attempt]) -> Iterator[Finding]:
    """Trials that ended by themselves, whose step records stop before their end, or lack a rank."""
    last: dict[str, Attempt] = {}
    for attempt in attempts:
        if attempt.trial_id not in last or attempt.attempt > last[attempt.trial_id].attempt:
            last[attempt.trial_id] = attempt
    for end in history.of(TrialEnded):
        if end.state not in {"done", "stopped"} or not end.step:
            continue
        if end.trial_id not in last:
            text = f"no step record is there of the {end.step} steps that it did"
            yield Finding(code=Code.EVIDENCE_MISSING, text=text, trial_id=end.trial_id)
            continue
        attempt = last[end.trial_id]
        for rank, rows in attempt.ranks.items():
            done = int((rows["step"] + num_steps_of(rows)).max())
            if done < end.step:
                text = f"step records of rank {rank} end at step {done}; the trial ended after step {end.step}"
                yield Finding(code=Code.EVIDENCE_MISSING, text=text, trial_id=end.trial_id)
        num_ranks = int(attempt.leader["num_workers"][-1])
        gone = [str(rank) for rank in range(num_ranks) if rank not in attempt.ranks]
        if gone:
            text = f"no step record of rank {', '.join(gone)} of {num_ranks} is there (attempt {attempt.attempt})"
            yield Finding(code=Code.EVIDENCE_MISSING, text=text, trial_id=end.trial_id)


def results(history: History, table: pa.Table, *, has_ended: bool) -> Iterator[Finding]:
    """Reports that the journal and the table of results tell differently."""
    rows: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault((str(row["trial_id"]), int(row["index"])), []).append(row)
    deaths = [entry.t_s for entry in history.of(Recovered)]
    told = {(str(report.trial_id), report.index) for report in history.of(Reported)}
    for report in history.of(Reported):
        found = rows.get((str(report.trial_id), report.index), [])
        if any(_is_same(report, row) for row in found):
            continue
        if found and not _is_told_twice(history, report):
            text = f"report {report.index} in the table of results is not the one in the journal"
            yield Finding(code=Code.EVIDENCE_ALTERED, text=text, trial_id=report.trial_id)
        elif not found and has_ended and not any(0.0 <= death - report.t_s <= _FLUSH_S for death in deaths):
            text = f"report {report.index} is missing in the table of results"
            yield Finding(code=Code.EVIDENCE_MISSING, text=text, trial_id=report.trial_id)
    for trial_id, index in sorted(rows.keys() - told):
        text = f"report {index} is in the table of results and not in the journal"
        yield Finding(code=Code.EVIDENCE_ALTERED, text=text, trial_id=trial_id)


def _is_same(report: Reported, row: Mapping[str, Any]) -> bool:
    metrics = dict(row["metrics"] or [])
    same = (row["step"], row["num_samples"], row["checkpoint"]) == (report.step, report.num_samples, report.checkpoint)
    return (
        same
        and metrics.keys() == report.metrics.keys()
        and all(_is_equal(metrics[name], value) for name, value in report.metrics.items())
    )


def _is_equal(one: object, other: object) -> bool:
    """Numbers are written exactly in both; what is no finite number is null in the journal."""
    if isinstance(one, float) and not math.isfinite(one):
        one = None
    return one == other


def _is_told_twice(history: History, report: Reported) -> bool:
    """Whether a trial that took up another's state made this report once more: the rows of both have its index."""
    return any(entry.trial_id == report.trial_id and entry.origin is not None for entry in history.of(TrialContinued))


def checkpoints(run_dir: Path, history: History, *, has_ended: bool, reads_all: bool) -> Iterator[Finding]:
    """Commits that a trial would go on from and are not there, and commits that are not as their manifests say.

    Args:
        run_dir: the run.
        history: its journal.
        has_ended: whether the run ended; while it goes on, commits come and go.
        reads_all: read every byte instead of sizes alone.
    """
    if has_ended:
        last = {str(report.trial_id): report.checkpoint for report in history.of(Reported) if report.checkpoint}
        for trial_id, checkpoint in sorted(last.items()):
            path = _where(run_dir, str(checkpoint))
            if not path.is_dir():
                text = f"its last commit {path.relative_to(run_dir)} is missing"
                yield Finding(code=Code.EVIDENCE_MISSING, text=text, trial_id=trial_id)
    for path in sorted((run_dir / "trials").glob("*/*/**/step-*")):
        if path.is_dir() and path.name.removeprefix("step-").isdigit() and (has_ended or reads_all):
            yield from _commit(run_dir, path, reads_all=reads_all)


def _commit(run_dir: Path, path: Path, *, reads_all: bool) -> Iterator[Finding]:
    trial_id, shown = path.relative_to(run_dir).parts[1], path.relative_to(run_dir)
    try:
        record = manifest.read(path)
        problems = manifest.problems_of(path, record) if reads_all else _sizes(path, record)
    except CheckpointError as error:
        problems = [str(error)]
    if problems:
        more = f" and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        text = f"the commit {shown} is damaged: {'; '.join(problems[:_MAX_NAMED])}{more}"
        yield Finding(code=Code.EVIDENCE_ALTERED, text=text, trial_id=trial_id)


def _sizes(path: Path, record: manifest.Manifest) -> list[str]:
    problems = []
    for entry in record.files:
        try:
            size = (path / entry.name).stat().st_size
        except OSError as error:
            problems.append(f"{entry.name} cannot be read ({error.strerror})")
            continue
        if size != entry.size_bytes:
            problems.append(f"{entry.name} has {size} bytes; its manifest says {entry.size_bytes}")
    return problems


def _where(run_dir: Path, checkpoint: str) -> Path:
    """Where a commit is now, if the run's directory was moved or copied since."""
    _, has_trials, inside = checkpoint.rpartition("trials/")
    return run_dir / "trials" / inside if has_trials else Path(checkpoint)
