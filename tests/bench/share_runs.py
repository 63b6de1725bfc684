"""The runs of `bench_gpu_share`: searches of equal trials that share one GPU, and how long each is watched.

Writes run files and starts `orchestrator run`, as a user would. Knows no figures.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from tests.bench.hand_trials import TINY, TINY_MICRO_BATCH
from tests.bench.part_process import start_run

Row = dict[str, Any]
NEVER = 10**11
"""Samples that no trial here reaches."""
_POLL_S = 0.1
_OPEN_LIMIT_S = 90.0


def model_of(size: str) -> tuple[Row, int]:
    """Parameters of the job of a size, and its micro-batch."""
    from tests.bench.gpu_job import SIZES

    return (TINY, TINY_MICRO_BATCH) if size == "tiny" else SIZES[size]


def run_file(name: str, storage: Path, size: str, **changes: Any) -> Row:
    """A run of endless equal trials in which no dial turns; `changes` replace sections or add to them."""
    params, micro_batch = model_of(size)
    on_cores = size == "tiny"
    file: Row = {
        "name": name,
        "storage": str(storage),
        "seed": 1,
        "job": {"name": "language", "params": {**params, "eval_windows": 64}},
        "search": {"num_trials": 1, "max_concurrent": 1, "scheduler": {"name": "fifo"}},
        "trial": {"samples_per_report": NEVER, "max_reports": 1, "micro_batch": micro_batch},
        "dials": {
            "share": {"enabled": False},
            "batch": {"enabled": False},
            "precision": {"enabled": False, "tiers": ["fp32" if on_cores else "bf16"]},
        },
        "policy": {"name": "goodput"},
        "devices": {"use": "cpu" if on_cores else "gpu"},
    }
    for section, values in changes.items():
        file[section] = {**file.get(section, {}), **values} if isinstance(values, dict) else values
    return file


def run(file: Row, *, train_s: float | None, limit_s: float) -> Row:
    """One `orchestrator run` of a run file; stopped after so many seconds of training, None to let it end.

    Args:
        file: the content of the run file.
        train_s: seconds from the first trial's first steps on.
        limit_s: seconds after which it is ended in any case.

    Raises:
        RuntimeError: no trial has done a step; the message holds the run's last words.
    """
    directory = Path(file["storage"]) / file["name"]
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier try
    path, log = directory.parent / f"{file['name']}.yaml", directory.parent / f"{file['name']}.out"
    path.write_text(yaml.safe_dump(file))
    began_s = time.monotonic()
    first_s: float | None = None
    with log.open("w") as out:
        process = start_run(path, out)
        while process.poll() is None and time.monotonic() - began_s < limit_s:
            if first_s is None and _has_stepped(directory):
                first_s = time.monotonic()
            if first_s is not None and train_s is not None and time.monotonic() - first_s > train_s:
                break
            if first_s is None and time.monotonic() - began_s > _OPEN_LIMIT_S:
                break
            time.sleep(_POLL_S)
        code = _end(process, directory)
    if first_s is None and not _has_stepped(directory):
        words = log.read_text(errors="replace")[-2500:]
        raise RuntimeError(
            f"{directory.name}: no step within {time.monotonic() - began_s:.0f} s, exit code {code}: {words}"
        )
    return {
        "directory": str(directory),
        "exit_code": code,
        "seconds": time.monotonic() - began_s,
        "seconds_to_first_steps": None if first_s is None else first_s - began_s,
        "tail": log.read_text(errors="replace")[-800:],
    }


def _has_stepped(directory: Path) -> bool:
    """Whether any trial has trained so far."""
    from orchestrator.run_dirs import read_status

    status = read_status(directory) or {}
    return any((trial.get("step") or 0) > 0 for trial in status.get("trials", []))


def _end(process: subprocess.Popen[bytes], directory: Path) -> int | None:
    """Ask a run to stop, and wait for it; its exit code."""
    from orchestrator.run_dirs import StopKind, request_stop

    if process.poll() is None:
        if directory.exists():
            request_stop(directory, StopKind.GRACEFUL)
        else:
            process.terminate()
    try:
        return process.wait(40)
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        return process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        return None
