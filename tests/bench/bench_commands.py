"""Seconds of the commands people wait for: `--help`, `check`, the demo, and, when asked with `--tests`, `make test`.

Whole processes with warm file caches, as somebody at a terminal feels them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

from tests.bench.orchestrated import scratch
from tests.bench.results_file import ROOT, Options, Report, median_figure, options

LIMITS_S = {"--help": 0.3, "check": 0.5, "demo": 90.0, "make test": 900.0}


def seconds_of(command: Sequence[str], *, codes: tuple[int, ...] = (0,)) -> float:
    """Wall seconds of a command that must end well."""
    began_s = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began_s
    if done.returncode not in codes:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return seconds


def _is_within(limit_s: float, value: float, _low: float, _high: float) -> bool:
    return value <= limit_s


def main() -> None:
    """Time each command; the short ones often."""
    with_tests = "--tests" in sys.argv
    if with_tests:
        sys.argv.remove("--tests")
    settings: Options = options("commands", repeats=20, quick_repeats=2)
    report = Report(settings)
    program = [sys.executable, "-m", "orchestrator"]
    with scratch() as directory:
        demo = [*program, "run", "demo.yaml", "--plain", "--set", f"storage={directory}", "--set"]
        times = {
            "--help": [seconds_of([*program, "--help"]) for _ in range(settings.repeats)],
            "check": [seconds_of([*program, "check", "demo.yaml"]) for _ in range(settings.repeats)],
            "demo": [seconds_of([*demo, f"name=demo{number}"]) for number in range(1 if settings.is_quick else 3)],
        }
    if with_tests:
        times["make test"] = [seconds_of(["make", "test"])]
    for name, values in times.items():
        limit_s = LIMITS_S[name]
        report.add(
            median_figure(
                name,
                values,
                "s",
                target=f"<= {limit_s:g} s",
                is_met=partial(_is_within, limit_s),
            )
        )
    report.write()


if __name__ == "__main__":
    main()
