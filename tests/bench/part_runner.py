"""Parts of a benchmark as processes of their own: each with a time limit, its result appended to a file at once.

So a part that hangs or dies loses nothing but itself. Knows nothing of what is measured. A benchmark hands its
functions to `main_of`; `--only` is how it calls itself for one part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.part_process import Row, keep, run_for, worker_logs
from tests.bench.results_file import say

Part = Callable[[argparse.Namespace], Row]

REHEARSAL_FACTOR = 4.0
"""How much longer a part may take on cores."""


def main_of(
    module: str,
    parts: Mapping[str, Part],
    limits_s: Mapping[str, float],
    *,
    default: Sequence[str],
    doc: str | None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run the parts that the command line asks for, or one of them in this process."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--directory", type=Path, required=True, help="for runs and their logs")
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(default))
    parser.add_argument("--budget", type=float, default=1e6, help="seconds after which no further part begins")
    parser.add_argument("--rehearse", action="store_true", help="on cores, with a tiny model")
    parser.add_argument("--only", choices=list(parts), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    if given.only:
        _do_here(given, parts[given.only])
        return
    began_s = time.monotonic()
    for part in given.parts:
        if time.monotonic() - began_s > given.budget:
            say(f"{part}: not begun, the time is used up")
            continue
        shutil.rmtree(given.directory / part, ignore_errors=True)
        limit_s = limits_s[part] * (REHEARSAL_FACTOR if given.rehearse else 1.0)
        _do_apart(module, part, given, limit_s, dict(environment or {}))


def leave(given: argparse.Namespace, name: str, value: object) -> None:
    """Leave something for the parts to come."""
    (given.directory / f"{name}.json").write_text(json.dumps(value, default=float))


def left(given: argparse.Namespace, name: str) -> Any:
    """What an earlier part has left; None where it did not get that far."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((given.directory / f"{name}.json").read_text())
    return None


def _do_here(given: argparse.Namespace, part: Part) -> None:
    try:
        row = part(given)
        keep(given, given.only, row)
    except Exception:
        say(traceback.format_exc())
        raise


def _add_worker_logs(log: Path) -> None:
    with log.open("a") as out:
        out.write("\n".join(f"{name}: {text}" for name, text in worker_logs().items()))


def _do_apart(module: str, part: str, given: argparse.Namespace, limit_s: float, environment: dict[str, str]) -> None:
    """One part in a process of its own; what came of it, or how it was ended, is in the results."""
    log, began_s = given.directory / f"{part}.log", time.monotonic()
    command = [sys.executable, "-m", module, "--only", part, "--out", str(given.out)]
    command += ["--directory", str(given.directory), *(["--rehearse"] * given.rehearse)]
    code = run_for(command, limit_s, log, {"PYTHONUNBUFFERED": "1", **environment}, partial(_add_worker_logs, log))
    seconds = time.monotonic() - began_s
    say(f"{part}: exit code {code} after {seconds:.0f} s")
    if code != 0:
        words = "not ended within its limit" if code is None else f"exit code {code}"
        keep(given, part, {"failed": words, "seconds": seconds, "log": log.read_text(errors="replace")[-4000:]})
