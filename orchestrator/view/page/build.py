"""The HTML file: a template, into which style, scripts, the chart library and the data of the runs are put.

Data stands in the page as JSON in which no character can end its element, and a content security policy allows the
page's own scripts alone, by their sums, and no request at all. Called by `orchestrator report`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import string
from collections.abc import Sequence
from html import escape
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.names import write_atomically
from orchestrator.view.page.gather import gather
from orchestrator.view.page.values import Page

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("data.js", "charts.js", "timeline.js", "ranking.js", "page.js")
MARK = "<!doctype html>\n<!-- orchestrator report -->\n"
"""How a page begins, by which it is known as one that may be replaced."""


def render(run_dirs: Sequence[Path], written_at: float) -> str:
    """The page of these runs.

    Args:
        run_dirs: the runs, in the order in which they are compared.
        written_at: seconds since the epoch.

    Raises:
        ConfigError: one of them is no run.
        TelemetryError, JournalError: a newer version wrote it.
    """
    page = Page(written_at=written_at, runs=tuple(gather(run_dir) for run_dir in run_dirs))
    scripts = {"echarts": _asset("echarts/echarts.min.js"), "script": _program()}
    allowed = " ".join(f"'sha256-{_sum(text)}'" for text in scripts.values())
    return MARK + string.Template(_asset("page.html")).substitute(
        policy=escape(f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"),
        title=escape(", ".join(run.name for run in page.runs)),
        style=_asset("page.css"),
        data=as_json(page),
        **scripts,
    )


def as_json(page: Page) -> str:
    """The data as JSON that may stand in a script element: it has no `<`, `>` or `&`, and is ASCII."""
    text = json.dumps(page, default=_fields, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def check_output(output: Path) -> None:
    """Refuse a file that cannot or should not be written.

    Raises:
        ConfigError: there is something of that name that is no report, or no directory to put it in.
    """
    if output.is_dir():
        raise ConfigError(f"{output} is a directory; give the name of a file", "--output")
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent} is no directory; make it, or give another file", "--output")
    if not output.exists():
        return
    with output.open("rb") as file:
        if file.read(len(MARK)) != MARK.encode():
            raise ConfigError(f"{output} exists and is no report; give another file, or remove it", "--output")


def write(text: str, output: Path) -> None:
    """Write a page; an older one of that name is replaced.

    Raises:
        ConfigError: as `check_output`.
    """
    check_output(output)
    write_atomically(output, text)


def _program() -> str:
    """The page's own scripts as one, in a scope of their own."""
    return '(() => {\n"use strict";\n' + "\n".join(map(_asset, _SCRIPTS)) + "\n})();\n"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _sum(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _fields(value: object) -> dict[str, object]:
    """A dataclass as JSON has it, field by field."""
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is no value of a page")
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
