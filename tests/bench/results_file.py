"""The file a benchmark leaves: what was measured, where, when and from which commit, with every raw number.

`Report` collects figures, prints them as a short table and writes `tests/bench/results/<theme>_<hardware>_<date>.json`.
Knows statistics and the machine, and nothing of what is measured. Used by every `tests/bench/bench_*.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("torch", "ray", "numpy", "pyarrow", "pydantic")
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line of a benchmark says."""

    theme: str
    is_quick: bool
    repeats: int
    out: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured, in words.
        value: the one number that stands for all repeats.
        statistic: which number that is: median, p95, ...
        unit: of `value` and `values`.
        low, high: the spread around `value`; `spread` says which.
        values: every repeat.
        target: what is asked for, in words; None for a figure that stands beside another one.
        is_met: whether `value` (and its spread, where the target names it) meets the target.
    """

    name: str
    value: float
    statistic: str
    unit: str
    low: float
    high: float
    spread: str
    values: list[float]
    target: str | None = None
    is_met: bool | None = None


@dataclass(slots=True)
class Report:
    """All figures of one benchmark, and the raw numbers behind them."""

    options: Options
    figures: list[Figure] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load_before: tuple[float, ...] = field(default_factory=os.getloadavg)

    def add(self, figure: Figure) -> None:
        """Take a figure and show it at once."""
        self.figures.append(figure)
        say(_line(figure))

    def write(self) -> Path:
        """Write the file and say where it is."""
        content = {
            "theme": self.options.theme,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),  # where Python lies is the machine's affair
            "is_quick": self.options.is_quick,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "load_average": {"before": list(self.load_before), "after": list(os.getloadavg())},
            "figures": [asdict(figure) for figure in self.figures],
            "notes": self.notes,
            "raw": self.raw,
        }
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(content, indent=1, allow_nan=False, default=float) + "\n")
        say(f"  -> {self.options.out}")
        return self.options.out


def chosen_part(parts: Collection[str]) -> str:
    """The part of a benchmark that the first word of the command line names; the rest is left for `options`."""
    if len(sys.argv) < 2 or sys.argv[1] not in parts:
        name = Path(sys.argv[0]).stem
        sys.exit(f"usage: python -m tests.bench.{name} PART ...; PART one of {', '.join(parts)}")
    return sys.argv.pop(1)


def options(theme: str, *, repeats: int, quick_repeats: int = 1) -> Options:
    """Read the command line that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench.bench_{theme}")
    parser.add_argument("--quick", action="store_true", help="a tiny version that only shows that it works")
    parser.add_argument("--repeats", type=int, help=f"repeats of everything (default {repeats}, quick {quick_repeats})")
    parser.add_argument("--out", type=Path, help="the file to write (default: tests/bench/results/...)")
    given = parser.parse_args()
    count = given.repeats or (quick_repeats if given.quick else repeats)
    if count < 1:
        parser.error(f"--repeats {count}; allowed: >= 1")
    out = given.out or default_path(theme, is_quick=given.quick)
    say(f"{theme}: {count} repeats on {machine()['name']}{' (quick: no measurement)' if given.quick else ''}")
    return Options(theme=theme, is_quick=given.quick, repeats=count, out=out.resolve())


def default_path(theme: str, *, is_quick: bool) -> Path:
    """Where the results of a theme go; a quick try never stands among the measurements."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    directory = ROOT / "build" / "bench" if is_quick else RESULTS
    return directory / f"{theme}_{machine()['name']}_{date}.json"


def ratio_figure(
    name: str, value: float, values: list[float], target: str | None, allowed: tuple[float, float]
) -> Figure:
    """A ratio with its least and most over seeds; it is met where it lies in `allowed`, ends included."""
    return Figure(
        name=name,
        value=value,
        statistic="ratio of means",
        unit="x",
        low=min(values),
        high=max(values),
        spread="min to max over seeds",
        values=values,
        target=target,
        is_met=None if target is None else allowed[0] <= value <= allowed[1],
    )


def median_figure(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    target: str | None = None,
    is_met: Callable[[float, float, float], bool] | None = None,
    bootstrap: bool = False,
) -> Figure:
    """The median with the range of all repeats, or with a 95 % bootstrap interval. `is_met(value, low, high)`."""
    value = statistics.median(values)
    low, high = bootstrap_interval(values, statistics.median) if bootstrap else (min(values), max(values))
    return Figure(
        name=name,
        value=value,
        statistic="median",
        unit=unit,
        low=low,
        high=high,
        spread="95 % bootstrap" if bootstrap else "min to max",
        values=list(values),
        target=target,
        is_met=None if is_met is None else is_met(value, low, high),
    )


def p95_figure(name: str, values: Sequence[float], unit: str, *, limit: float | None = None) -> Figure:
    """The 95th percentile with its bootstrap interval, to be at most `limit`."""
    value = percentile(values, 95)
    low, high = bootstrap_interval(values, lambda sample: percentile(sample, 95))
    return Figure(
        name=name,
        value=value,
        statistic="p95",
        unit=unit,
        low=low,
        high=high,
        spread="95 % bootstrap",
        values=list(values),
        target=None if limit is None else f"<= {limit:g} {unit}",
        is_met=None if limit is None else value <= limit,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float], seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of a statistic; the same for the same values."""
    draw = random.Random(seed)
    count = max(200, min(_NUM_RESAMPLES, 2_000_000 // len(values)))
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(count))
    return found[int(0.025 * count)], found[int(0.975 * count)]


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, memory, versions. `name` is short enough for a file name."""
    model = _cpu_model()
    cores = len(os.sched_getaffinity(0))
    gpus = _gpus()
    kind = gpus[0] if gpus else f"{model}-{cores}cores"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-"),
        "cpu": model,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def commit() -> str:
    """The commit of the tree, with `+changes` when files differ from it; 'unknown' outside a checkout."""
    head, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    if head is None:
        return "unknown"
    return f"{head}+changes" if dirty else head


def say(text: str) -> None:
    """Print a line for whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _line(figure: Figure) -> str:
    verdict = {True: "  met", False: "  NOT MET", None: ""}[figure.is_met]
    target = "" if figure.target is None else f"  target {figure.target}"
    spread = f"[{figure.low:.4g}, {figure.high:.4g}]"
    return f"  {figure.name:<58} {figure.value:>10.4g} {figure.unit:<10} {spread:<20}{target}{verdict}"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs of this machine; empty where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
