"""Run directories seen from outside: which there are, what state each is in, and how to ask one to stop.

Reads nothing but `status.json` and the driver's lock, writes nothing but the stop request and, for a driver whose
policy actor could not, the state a run ended in. Knows neither Ray nor the journal. Used by the commands and the views;
the policy actor of a run writes `status.json`, and its driver looks for the request.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.config.words import did_you_mean, printable
from orchestrator.errors import ConfigError
from orchestrator.names import is_safe_name, run_directory, write_atomically
from orchestrator.processes import Life, Owner

STATUS_FILE = "status.json"
STOP_REQUEST = ("control", "stop")
# States of status.json after which the driver writes it no more.
ENDED_STATES = frozenset({"done", "failed", "interrupted"})
_ENDED_TRIAL_STATES = frozenset({"done", "stopped", "failed"})
# The driver keeps this file locked while it lives; it says which process of which host that is.
LOCK_FILE = ("control", "lock")
_SILENT_S = 5.0
_MAX_STATUS_BYTES = 1 << 30
SCHEMA = 1
"""Of status files and run files; those of a newer version are not read."""
RUN_FILE, BEGUN_FILE = "run.yaml", ("control", "run.yaml")
"""The run file for people, and as the run began, which counts."""
_SCHEMA_LINE = re.compile(r"# schema: (\d{1,9})$", re.MULTILINE)
_POLL_S = 0.1


class StopKind(StrEnum):
    """What a stop request asks for, as written in the request file."""

    GRACEFUL = "graceful"
    NOW = "now"


class StopResult(StrEnum):
    """How waiting for a stop ended."""

    ENDED = "ended"
    DRIVER_GONE = "driver gone"
    TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One line of `orchestrator list`.

    Attributes:
        name: the directory's name.
        state: what status.json says; 'unreadable' if it says nothing or may not be read; 'newer' if a newer version
            wrote it; 'lost' if its driver died without a word.
        num_trials: trials known so far.
        num_ended: trials that ended, whatever way.
        updated_s: when status.json was replaced last, seconds since the epoch.
        run_dir: the directory.
    """

    name: str
    state: str
    num_trials: int
    num_ended: int
    updated_s: float
    run_dir: Path


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of status.json, None where it is missing or no JSON object."""
    try:
        with (run_dir / STATUS_FILE).open("rb") as stream:
            status = json.loads(stream.read(_MAX_STATUS_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) else None


def state_of(run_dir: Path, status: dict[str, Any] | None) -> str:
    """The run's state in one printable word; 'lost' where its driver died without a last word."""
    if status is None and _has_only_begun(run_dir):
        return "lost" if is_driver_gone(run_dir) else "starting"
    if status is None:
        return "unreadable"
    if _is_newer(status):
        return "newer"
    state = printable(str(status.get("state", "unknown")), 30)
    return "lost" if state not in ENDED_STATES and is_driver_gone(run_dir) else state


def is_driver_gone(run_dir: Path) -> bool:
    """Whether the process that ran the run is known to be dead.

    A run on another host that shares the storage is never judged. A lock of earlier versions holds a process id alone:
    there the process must be gone and status.json silent.
    """
    try:
        text = (run_dir / LOCK_FILE[0] / LOCK_FILE[1]).read_text(encoding="utf-8")
        owner = Owner.parse(text)
        if owner is not None:
            return owner.life is Life.DEAD
        pid = int(text[:20])
        silent_s = time.time() - (run_dir / STATUS_FILE).stat().st_mtime
    except (OSError, ValueError):
        return False
    if not 0 < pid < 1 << 31 or silent_s < _SILENT_S:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def mark_ended(run_dir: Path, state: str) -> None:
    """Write down that the run ended where its policy actor did not come to it, as after a death of Ray."""
    status = read_status(run_dir)
    if status is None or status.get("state") in ENDED_STATES:
        return
    with contextlib.suppress(OSError):
        write_atomically(run_dir / STATUS_FILE, json.dumps(status | {"state": state}))


def list_runs(storage: Path) -> list[RunSummary]:
    """Runs below `storage`, newest first: what has begun, and what may not be looked into."""
    found = []
    for run_dir in _run_dirs(storage):
        status = read_status(run_dir)
        states = _trial_states((status or {}).get("trials"))
        num_ended = sum(1 for state in states if state in _ENDED_TRIAL_STATES)
        summary = RunSummary(
            name=run_dir.name,
            state=state_of(run_dir, status),
            num_trials=len(states),
            num_ended=num_ended,
            updated_s=_updated_s(run_dir),
            run_dir=run_dir,
        )
        found.append(summary)
    return sorted(found, key=lambda run: (-run.updated_s, run.name))


def _run_dirs(storage: Path) -> list[Path]:
    try:
        found = [path for path in storage.iterdir() if is_safe_name(path.name)]
    except OSError:
        return []
    return [path for path in found if _may_be_run(path)]


def _may_be_run(path: Path) -> bool:
    try:
        return (path / STATUS_FILE).is_file() or path.joinpath(*BEGUN_FILE).is_file()
    except OSError:  # another user's directory: whether it is a run cannot be seen
        return True


def _has_only_begun(run_dir: Path) -> bool:
    """Whether a run has a run file and no status yet: it writes its first one once Ray has started."""
    try:
        return run_dir.joinpath(*BEGUN_FILE).is_file() and not (run_dir / STATUS_FILE).exists()
    except OSError:
        return False


def _updated_s(run_dir: Path) -> float:
    for path in (run_dir / STATUS_FILE, run_dir):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _is_newer(status: dict[str, Any]) -> bool:
    schema = status.get("schema", SCHEMA)
    return isinstance(schema, int) and schema > SCHEMA


def require_readable(run_dir: Path) -> None:
    """Refuse a run of which this user may not read the status, or that a newer version wrote.

    Raises:
        ConfigError: it is one of these.
    """
    shown = printable(str(run_dir), 200)
    try:
        with (run_dir / STATUS_FILE).open("rb"):
            pass
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"run {shown} cannot be read ({error.strerror}; it belongs to {_owner_of(run_dir)}); allowed: a run of"
            " yours, or one whose files you may read"
        ) from None
    status = read_status(run_dir)
    if status is not None and _is_newer(status):
        raise ConfigError(
            f"run {shown} was written by a newer version (schema {status['schema']}); this one reads up to schema"
            f" {SCHEMA}: use the version that wrote it"
        )


def _owner_of(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "another user"


def run_file_schema(text: str) -> int:
    """The schema that a run file of a run directory names; that of the first versions where it names none."""
    match = _SCHEMA_LINE.match(text)
    return 1 if match is None else int(match[1])


def with_schema(text: str) -> str:
    """A run file for a run directory, with its schema in the first line."""
    return f"# schema: {SCHEMA}\n{text}"


def _trial_states(trials: object) -> list[str]:
    rows = list(trials.values()) if isinstance(trials, dict) else trials
    if not isinstance(rows, list):
        return []
    return [str(row.get("state", "")).lower() if isinstance(row, dict) else str(row).lower() for row in rows]


def find_run(run: str, storage: Path, *, may_be_new: bool = False) -> Path:
    """The run directory that a command's argument names: a path, or a name below `storage`.

    Args:
        run: what was said.
        storage: where runs are.
        may_be_new: whether a run that was broken off before its first status will do.

    Raises:
        ConfigError: there is none; the message names the run that was probably meant.
    """
    known = sorted(p.name for p in _run_dirs(storage))
    looks_like_path = "/" in run or run in {".", ".."}
    try:
        run_dir = Path(run).resolve() if looks_like_path else run_directory(storage, run)
        is_there = run_dir.is_dir()
        if is_there:
            require_readable(run_dir)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"run '{printable(run, 80)}' cannot be opened ({printable(str(error), 80)})") from None
    if not is_there:
        where = "" if looks_like_path else f" in {printable(str(storage), 200)}"
        runs = f"existing: {', '.join(known[:10])}" if known else "there are no runs there"
        what = f"no run '{printable(run, 80)}'{where}; {runs}{did_you_mean(Path(run).name, known)}"
        raise ConfigError(f"{what} (--storage names another directory)")
    is_new = may_be_new and (run_dir / RUN_FILE).is_file()
    if not is_new and not (run_dir / STATUS_FILE).is_file():
        what = f"{printable(str(run_dir), 200)} is no run directory: it has no {STATUS_FILE}"
        raise ConfigError(f"{what}; give the name of a run or the directory that `run` printed last")
    return run_dir


def request_stop(run_dir: Path, kind: StopKind) -> None:
    """Ask the run's driver to stop.

    Raises:
        ConfigError: the request cannot be written.
    """
    control = run_dir / STOP_REQUEST[0]
    try:
        if control.is_symlink():
            raise ConfigError(f"{printable(str(control), 200)} is a symbolic link; allowed: a real directory")
        control.mkdir(exist_ok=True)
        write_atomically(control / STOP_REQUEST[1], kind.value)
    except OSError as error:
        raise ConfigError(f"the stop request cannot be written ({error}); allowed: a run directory of yours") from None


def stop_request(run_dir: Path) -> StopKind | None:
    """What somebody has asked the run's driver for; None where nobody has."""
    try:
        text = (run_dir / STOP_REQUEST[0] / STOP_REQUEST[1]).read_text().strip()
    except OSError:
        return None
    return StopKind.NOW if text == StopKind.NOW.value else StopKind.GRACEFUL


def wait_until_ended(
    run_dir: Path,
    timeout_s: float,
    *,
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> StopResult:
    """Wait until status.json says that the run ended, its driver is gone, or `timeout_s` is over."""
    deadline_s = now_s() + timeout_s
    while True:
        status = read_status(run_dir)
        if status is not None and status.get("state") in ENDED_STATES:
            return StopResult.ENDED
        if is_driver_gone(run_dir):
            return StopResult.DRIVER_GONE
        if now_s() >= deadline_s:
            return StopResult.TIMED_OUT
        sleep(_POLL_S)
