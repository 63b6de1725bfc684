"""A process that may hang: whether it is stopped or gone, where its threads stand, and its end.

Each worker process has Python's `faulthandler` write the stacks of all its threads to a file of the run when it gets
`STACK_SIGNAL`. That needs no rights over the process, as a debugger would, and works while it holds the interpreter's
lock; not while it is stopped. Reads `/proc` only. Knows no Ray; the driver calls it on the node of the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from orchestrator.control.silence import Silent

STACK_SIGNAL = signal.SIGRTMIN + 6
"""Means nothing to anybody else; sent only to a process that catches it, because it would end another."""
_STACK_S = 2.0
_MAX_STACK_BYTES = 16_384
_STATES = {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone", "D": "waits for the disk or a device"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What was seen of a process.

    Attributes:
        state: runs, stopped, gone, unknown, or what it waits for.
        stack: where its threads stand; empty where that cannot be had.
    """

    state: str
    stack: str = ""

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped by a signal or a debugger."""
        return self.state == "stopped"


def stacks_of(run_dir: Path, pid: int) -> Path:
    """Where a process of a run writes its stacks."""
    return run_dir / "control" / "stacks" / f"{pid}.txt"


def answer_with_stacks(run_dir: Path) -> None:
    """Have this process write its stacks when it is asked to; without a file it goes on without."""
    path = stacks_of(run_dir, os.getpid())
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        faulthandler.register(STACK_SIGNAL, file=path.open("w"), all_threads=True)


def examine(pid: int, run_dir: Path | None) -> Process:
    """Look at a process of this host; with `run_dir` ask it for its stacks, too."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return Process(state="gone")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    state = _STATES.get(fields.get("State", "").strip()[:1], "runs")
    is_catching = int(fields.get("SigCgt", "0"), 16) >> (STACK_SIGNAL - 1) & 1
    if run_dir is None or state in {"stopped", "gone"} or not is_catching:
        return Process(state=state)
    return Process(state=state, stack=_stack(pid, stacks_of(run_dir, pid)))


def _stack(pid: int, path: Path) -> str:
    """What a process writes when it is asked where it stands; empty where nothing comes."""
    try:
        before = path.stat().st_size
        os.kill(pid, STACK_SIGNAL)
        deadline_s = time.monotonic() + _STACK_S
        size = before
        while time.monotonic() < deadline_s:
            time.sleep(0.1)
            last, size = size, path.stat().st_size
            if size > before and size == last:
                break
        with path.open("rb") as file:
            file.seek(before)
            return file.read(_MAX_STACK_BYTES).decode(errors="replace")
    except OSError:
        return ""


def end(pid: int) -> None:
    """End a process of this host at once; nothing where it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def verdict(silent: Silent, found: Process, hang_timeout_s: float | None) -> Literal["restart", "warn"] | None:
    """What to do about a silent rank: end it so that its worker group is opened again, say so, or wait.

    A declared training tells of everything it does, so that silence means that it hangs. A function may be busy with
    anything, and is ended only where its process is stopped, or after the time that the user has set.
    """
    if not silent.is_over or found.state == "gone":  # of one that is gone Ray knows
        return None
    if not silent.is_function or found.is_stopped:
        return "restart"
    return "restart" if hang_timeout_s is not None and silent.silent_s > hang_timeout_s else "warn"
