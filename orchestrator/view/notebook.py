"""A run as HTML for a notebook, and a table in its output that is updated in place while the run goes on.

IPython is used where the process has it loaded already, as in a notebook, and never imported otherwise. What is shown
is a function of a status; strings come from users, so each is escaped. Called by `orchestrator.api`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from orchestrator.view.frame import dial_texts
from orchestrator.view.report import rank
from orchestrator.view.text import (
    MISSING,
    clean,
    dicts,
    mapping,
    show_count,
    show_number,
    show_params,
    show_seconds,
)

_MAX_ROWS = 20
_PARAM_CHARACTERS = 100
_COLUMNS = ("trial", "state", "metric", "step", "loss", "share", "batch", "tier", "parameters")

Status = Mapping[str, Any]


class Handle(Protocol):
    """A place in a notebook's output, as `IPython.display.DisplayHandle`."""

    def update(self, shown: Any) -> None:  # noqa: ANN401 - anything that IPython shows
        """Show something else there."""
        ...


def status_html(status: Status, now_s: float | None = None) -> str:
    """A run and its trials, best first, as a small table."""
    trials = rank(dicts(status.get("trials")), str(status.get("mode")))
    started, updated = status.get("started_at"), status.get("updated_at")
    until = updated if now_s is None else now_s
    took = show_seconds(until - started) if isinstance(started, int | float) and until is not None else MISSING
    counts: dict[str, int] = {}
    for trial in trials:
        counts[clean(trial.get("state"))] = counts.get(clean(trial.get("state")), 0) + 1
    named = ", ".join(f"{number} {state}" for state, number in counts.items()) or "no trials yet"
    title = f"{clean(status.get('run_id') or MISSING)}: {clean(status.get('state') or MISSING)} after {took}, {named}"
    metric = clean(status.get("metric") or "metric")
    head = [metric if name == "metric" else name for name in _COLUMNS]
    rows = [_cells(trial) for trial in trials[:_MAX_ROWS]]
    more = f"<p>... and {len(trials) - _MAX_ROWS} more</p>" if len(trials) > _MAX_ROWS else ""
    failed = [trial for trial in trials if trial.get("state") == "failed"]
    errors = "".join(f"<p>{escape(clean(t.get('trial_id')))}: {escape(clean(t.get('error')))}</p>" for t in failed[:3])
    dials = escape("dials: " + "; ".join(dial_texts(status)))
    return f"<div><b>{escape(title)}</b>{_table(head, rows)}{more}{errors}<p>{dials}</p></div>"


def _cells(trial: Mapping[str, object]) -> list[str]:
    batch = f"{show_count(trial.get('micro_batch'))} x {show_count(trial.get('grad_accum'))}"
    return [
        clean(trial.get("trial_id") or MISSING),
        clean(trial.get("state") or MISSING),
        show_number(trial.get("metric_value")),
        show_count(trial.get("step")),
        show_number(trial.get("loss")),
        show_number(trial.get("share"), 3),
        MISSING if trial.get("micro_batch") is None else batch,
        clean(trial.get("tier") or MISSING),
        show_params(mapping(trial.get("params")), _PARAM_CHARACTERS),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def notebook() -> Any:  # noqa: ANN401 - a module of IPython
    """`IPython.display`, where this process is the kernel of a notebook; None elsewhere."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    if shell is None or not hasattr(shell, "kernel"):  # a shell in a terminal has none
        return None
    from importlib import import_module

    return import_module("IPython.display")


class LiveTable:
    """Shows a run in a notebook while it goes on.

    Args:
        display: the module `IPython.display`.
        read_status: the newest status, None where there is none yet.
        period_s: seconds between two looks at it.
    """

    def __init__(self, display: Any, read_status: Callable[[], Status | None], period_s: float = 1.0) -> None:  # noqa: ANN401
        self._display, self._read_status, self._period_s = display, read_status, period_s
        self._handle: Handle | None = None
        self._last = ""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="notebook", daemon=True)

    def __enter__(self) -> None:
        self._handle = self._display.display(self._display.HTML("<p>the run starts</p>"), display_id=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._show(is_last=True)

    def _follow(self) -> None:
        while not self._is_over.wait(self._period_s):
            self._show()

    def _show(self, *, is_last: bool = False) -> None:
        status = self._read_status()
        if status is None or self._handle is None:
            return
        shown = status_html(status, None if is_last else time.time())
        if shown != self._last:
            self._last = shown
            self._handle.update(self._display.HTML(shown))
