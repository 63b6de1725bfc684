"""A part of a benchmark as a process with a time limit, and what of its run is kept where the limit ends it.

Used by the benchmarks that have parts. Knows the files of a run directory, and nothing of what a part measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

from tests.bench.results_file import ROOT, commit, machine

Row = dict[str, Any]
_SETTINGS = ("grad_accum", "micro_batch", "num_workers", "share", "tier")
_STATUS = ("trial_id", "state", "slot_id", "attempt", "step", "loss", "throughput_per_s", "share", "num_workers")
_TAIL = 1500


def run_for(
    command: list[str],
    limit_s: float,
    log: Path,
    environment: dict[str, str],
    at_limit: Callable[[], None] | None = None,
) -> int | None:
    """Run a command with its output in a file; its exit code, None where it was ended at its limit.

    Args:
        command: what to run, in the root of the repository.
        limit_s: seconds.
        log: the file.
        environment: beside that of this process.
        at_limit: called before the process is ended, while what it has started still runs.
    """
    with log.open("w") as out:
        process = psutil.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            return int(process.wait(limit_s))
        except psutil.TimeoutExpired:
            if at_limit is not None:
                at_limit()
            _end(process)
            return None


def start_run(file: Path, out: IO[str]) -> subprocess.Popen[bytes]:
    """Start `orchestrator run` of a run file, its output in `out`."""
    command = [sys.executable, "-m", "orchestrator", "run", str(file), "--plain"]
    return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)


def keep(given: argparse.Namespace, part: str, row: Row) -> None:
    """Append a result to the file that the command line names, synced."""
    whole = {"part": part, **row, "commit": commit(), "machine": machine(), "command": sys.orig_argv}
    with given.out.open("a") as out:
        out.write(json.dumps(whole, default=float) + "\n")
        out.flush()
        os.fsync(out.fileno())


def so_far(directory: Path) -> Row:
    """What the journal, the status, the steps and the logs of a run show at this time, as far as they are there."""
    if not directory.exists():
        return {}
    found: Row = {}
    for look in (_journal, _status, _steps, _logs):
        try:
            found |= look(directory)
        except Exception as error:  # whatever is damaged, the rest is still evidence
            found[look.__name__.strip("_")] = f"{type(error).__name__}: {error}"
    return found


def worker_logs() -> dict[str, str]:
    """The last words of Ray's processes on this machine, before their directory goes."""
    found = Path("/tmp").glob("orch-*/session_2*/logs/worker*.err")
    newest = sorted((path for path in found if path.stat().st_size), key=lambda path: path.stat().st_mtime)[-6:]
    return {path.name: tail(path) for path in newest}


def tail(path: Path, num_chars: int = _TAIL) -> str:
    """The end of a text file; empty without one."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")[-num_chars:]
    return ""


def _end(process: psutil.Popen) -> None:
    """End a part and all that it has started: asked first, so that MPS and Ray are put away."""
    family = [process]
    with contextlib.suppress(psutil.Error):
        family += process.children(recursive=True)
    for signal_all in ("terminate", "kill"):
        for each in family:
            with contextlib.suppress(psutil.Error):
                getattr(each, signal_all)()
        psutil.wait_procs(family, timeout=8)


def _journal(directory: Path) -> Row:
    from orchestrator.control.journal import read

    path = directory / "journal.jsonl"
    entries = list(read(path)) if path.exists() else []
    by_kind: dict[str, list[Row]] = {}
    for entry in entries:
        by_kind.setdefault(entry["kind"], []).append(entry)
    results = by_kind.get("result", [])
    hellos = [entry for entry in by_kind.get("slot", []) if entry.get("hello")]
    return {
        "begun_t_s": entries[0].get("t_s", (by_kind.get("trial_queued") or [{}])[0].get("t_s")) if entries else None,
        "results": [{key: e[key] for key in ("trial_id", "step", "t_s", "metrics")} for e in results[-16:]],
        "num_results": len(results),
        "acks": [
            {
                "trial_id": e["trial_id"],
                "step": e["step"],
                "t_s": e["t_s"],
                "settings": {key: e["settings"].get(key) for key in _SETTINGS},
            }
            for e in by_kind.get("ack", [])[-40:]
        ],
        "num_acks": len(by_kind.get("ack", [])),
        "placements": [
            {"slot_id": e["slot_id"], "epoch": e["epoch"], "t_s": e["t_s"], "placement": e["hello"]["placement"]}
            for e in hellos
        ],
        "enforced_by": sorted({e["hello"]["enforced_by"] for e in hellos}),
        "slots": [
            {key: e.get(key) for key in ("slot_id", "epoch", "state", "t_s")} for e in by_kind.get("slot", [])[-20:]
        ],
        "attempts": [
            {key: e[key] for key in ("trial_id", "attempt", "slot_id", "t_s")}
            for e in by_kind.get("trial_assigned", [])
        ],
        "resizes": [
            {key: e[key] for key in ("stage", "num_workers", "reason", "t_s")} for e in by_kind.get("trial_resize", [])
        ],
        "trials_ended": [
            {key: e[key] for key in ("trial_id", "state", "reason", "step", "t_s")}
            for e in by_kind.get("trial_ended", [])
        ],
    }


def _status(directory: Path) -> Row:
    path = directory / "status.json"
    if not path.exists():
        return {}
    status = json.loads(path.read_text())
    trials = [{key: trial.get(key) for key in _STATUS} for trial in status["trials"]]
    return {"status": trials, "status_at": status.get("updated_at")}


def _steps(directory: Path) -> Row:
    """The steps that were written, by trial, attempt and number of ranks."""
    import orchestrator

    table = orchestrator.load_run(directory).to_pandas("steps")
    names = ["trial_id", "attempt", "num_workers"]
    ranks = table[table["rank"] == 0].groupby(names, observed=True)
    steps = ranks.agg(first=("step", "min"), last=("step", "max"), median_step_s=("step_s", "median"))
    return {"steps": json.loads(steps.reset_index().to_json(orient="records"))}


def _logs(directory: Path) -> Row:
    """The ends of the logs of a run, of its trials, and of the command (beside the directory)."""
    paths = [directory.parent / f"{directory.name}.out", *sorted(directory.glob("*.log"))]
    paths += sorted(directory.glob("trials/*/log.txt"))
    return {"logs": {str(path.relative_to(directory.parent)): tail(path) for path in paths if path.exists()}}
