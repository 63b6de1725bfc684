"""What is said at the end of a run: who won, what each dial did, what to do next, and where everything lies.

A function of the last status and of the logs of failed trials. Called by the driver when a run ends; the last line is
the run directory, alone, so that scripts can take it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.view.failures import failure_lines
from orchestrator.view.frame import shown_dials
from orchestrator.view.text import (
    MISSING,
    clean,
    dicts,
    mapping,
    number,
    show_count,
    show_gain,
    show_number,
    show_params,
    show_seconds,
    table,
    whole,
    width_of,
)

_MAX_RANKED = 20
_LEAST_WIDTH = 80
_LEAST_PARAMS = 28
"""Columns of the table of trials, and of the parameters in it, at least."""


def render(status: Mapping[str, object], run_dir: Path, *, width: int = _LEAST_WIDTH) -> str:
    """The report, several lines without a newline at the end; the last one is the run directory.

    `width` is that of the terminal, which the parameters of trials are fitted to.
    """
    trials = dicts(status.get("trials"))
    ranked = rank(trials, str(status.get("mode")))
    parts = [
        [_headline(status, trials)],
        _ranking(ranked, status, max(width, _LEAST_WIDTH)),
        failure_lines(trials),
        _dials(status),
        _next_commands(status, run_dir),
        [str(run_dir)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def render_broken_off(run_dir: Path) -> str:
    """The report of a run that ended before its first status; the last line is the run directory."""
    command = f"orchestrator resume {shlex.quote(clean(run_dir))}"
    return f"the run ended before any trial began\n\nnext:\n  {command}  # begin it\n\n{run_dir}"


def count_failed(status: Mapping[str, object]) -> int:
    """Trials that failed."""
    return sum(trial.get("state") == "failed" for trial in dicts(status.get("trials")))


def failure_line(status: Mapping[str, object]) -> str | None:
    """One line that says how many trials failed, None where none did."""
    num_failed, num_trials = count_failed(status), len(dicts(status.get("trials")))
    if not num_failed:
        return None
    return f"{num_failed} of {num_trials} trial{'s' * (num_trials != 1)} failed; the report above says why"


def rank(trials: Sequence[Mapping[str, object]], mode: str) -> list[Mapping[str, object]]:
    """Trials by metric, best first; those without a value follow in the order of the search."""
    sign = -1.0 if mode == "max" else 1.0

    def key(trial: Mapping[str, object]) -> tuple[bool, float, int]:
        value = number(trial.get("metric_value"))
        return value is None, 0.0 if value is None else sign * value, whole(trial.get("index")) or 0

    return sorted(trials, key=key)


def _headline(status: Mapping[str, object], trials: Sequence[Mapping[str, object]]) -> str:
    started, updated = number(status.get("started_at")), number(status.get("updated_at"))
    took = MISSING if started is None or updated is None else show_seconds(updated - started)
    num_done = sum(trial.get("state") in {"done", "stopped"} for trial in trials)
    num_failed = count_failed(status)
    failed = f", {num_failed} failed" if num_failed else ""
    return (
        f"run {clean(status.get('run_id') or MISSING)} {clean(status.get('state') or MISSING)} after {took}:"
        f" {num_done} of {len(trials)} trials ended well{failed}, {show_count(status.get('generation'))} plans"
        f" by policy {clean(status.get('policy') or MISSING)}"
    )


def _ranking(ranked: Sequence[Mapping[str, object]], status: Mapping[str, object], width: int) -> list[str]:
    if not ranked:
        return []
    metric = clean(status.get("metric") or "metric")
    rows = [
        [
            str(place),
            clean(trial.get("trial_id") or MISSING),
            show_number(trial.get("metric_value")),
            clean(trial.get("state") or MISSING),
            show_count(trial.get("step")),
            show_count(trial.get("num_samples")),
        ]
        for place, trial in enumerate(ranked[:_MAX_RANKED], start=1)
    ]
    columns, numeric = ["", "trial", metric, "state", "step", "samples"], ["", metric, "step", "samples"]
    room = max(_LEAST_PARAMS, width - 2 - max(map(width_of, table(columns, rows, numeric=numeric))))
    for row, trial in zip(rows, ranked, strict=False):
        row.append(show_params(mapping(trial.get("params")), room))
    lines = table([*columns, "parameters"], rows, numeric=numeric)
    if len(ranked) > _MAX_RANKED:
        lines.append(f"... and {len(ranked) - _MAX_RANKED} more")
    return lines


def _dials(status: Mapping[str, object]) -> list[str]:
    """What each dial did and gained."""
    lines = []
    dials = mapping(status.get("dials"))
    for name in shown_dials(dials):
        dial = mapping(dials.get(name))
        if not dial.get("enabled"):
            lines.append(f"dial {name:<10} off")
            continue
        changes = whole(dial.get("changes_applied")) or 0
        gain = number(dial.get("gain"))
        text = "no gain measured" if gain is None else f"measured gain per change {show_gain(gain)} goodput"
        lines.append(f"dial {name:<10} {changes} change{'s' * (changes != 1)} applied, {text}")
    return lines


def _next_commands(status: Mapping[str, object], run_dir: Path) -> list[str]:
    run = shlex.quote(clean(run_dir))
    commands = []
    if status.get("state") != "done":
        commands.append((f"orchestrator resume {run}", "go on from the last checkpoints"))
    commands.append((f"orchestrator explain {run}", "every decision, with what it predicted and what it gained"))
    generation = whole(status.get("generation"))
    if generation:
        commands.append(
            (f"orchestrator explain {run} --decision {generation}", "one of them in full: what was weighed")
        )
    commands.append((f"orchestrator verify {run}", "check that nothing was lost, torn or over-committed"))
    code = f"import orchestrator; print(orchestrator.load_run({json.dumps(clean(run_dir))}).trials)"
    width = max(len(command) for command, _ in commands)
    return [
        "next:",
        *(f"  {command:<{width}}  # {text}" for command, text in commands),
        f"  python -c {shlex.quote(code)}",
    ]
