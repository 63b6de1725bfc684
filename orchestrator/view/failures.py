"""Why trials failed: alike failures are told once, with the traceback that the trial's log holds.

Knows the status of a run and how a log line begins. Called by the report, and by the driver to end a search in which
every trial fails in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.config.words import printable
from orchestrator.view.frame import failure_text
from orchestrator.view.text import MISSING, dicts

_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
_TRACEBACK = "Traceback (most recent call last):"
_TAIL_BYTES = 1 << 18
_MAX_LINES, _MAX_CHARACTERS = 40, 300


def common_error(status: Mapping[str, object], num_ended: int) -> str | None:
    """The error with which every trial that has ended failed, once `num_ended` have; None where they differ."""
    ended = [trial for trial in dicts(status.get("trials")) if trial.get("state") in {"done", "stopped", "failed"}]
    errors = {str(trial.get("error")) for trial in ended if trial.get("state") == "failed"}
    if len(ended) < num_ended or len(errors) != 1 or any(trial.get("state") != "failed" for trial in ended):
        return None
    return errors.pop()


def failure_lines(trials: Sequence[Mapping[str, object]]) -> list[str]:
    """Which trials failed, and why; those that failed alike on one line, with the end of the traceback of the first."""
    alike: dict[str, list[Mapping[str, object]]] = {}
    for trial in trials:
        if trial.get("state") == "failed":
            alike.setdefault(str(trial.get("error")), []).append(trial)
    lines: list[str] = []
    for same in alike.values():
        first = failure_text(same[0])
        others = len(same) - 1
        lines.append(f"{first}; so did {others} other trial{'s' * (others > 1)}" if others else first)
        lines += [f"    {line}" for line in traceback_in(str(same[0].get("log_path") or MISSING))]
    return lines


def traceback_in(log_path: str) -> list[str]:
    """The last traceback in a trial's log, safe to print; empty where there is none."""
    try:
        with Path(log_path).open("rb") as file:
            file.seek(max(0, Path(log_path).stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    if not starts:
        return []
    found = lines[starts[-1] :]
    end = next((number for number, line in enumerate(found) if _LOG_LINE.match(line)), len(found))
    found = found[:end]
    if len(found) > _MAX_LINES:
        found = [*found[: _MAX_LINES // 2], "    ...", *found[-_MAX_LINES // 2 :]]
    return [printable(line.expandtabs(), _MAX_CHARACTERS) for line in found]
