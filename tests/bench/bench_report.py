"""Seconds and bytes of `orchestrator report` for searches of 50 and 1,000 trials, as whole processes.

The runs are made by hand, with 600 steps, four decisions and six reports in each trial.
"""

from __future__ import annotations

import sys
from functools import partial

from tests.bench.bench_commands import seconds_of
from tests.bench.orchestrated import scratch
from tests.bench.results_file import Options, Report, median_figure, options
from tests.unit.orchestrator.view.page_runs import search_run

LIMITS = {50: (5.0, 2.0), 1000: (15.0, 8.0)}
"""Number of trials -> seconds and megabytes at most."""


def _is_within(limit: float, value: float, _low: float, _high: float) -> bool:
    return value <= limit


def main() -> None:
    """Time each report, and weigh it."""
    settings: Options = options("report", repeats=5, quick_repeats=1)
    report = Report(settings)
    with scratch() as directory:
        for num_trials, (limit_s, limit_mb) in LIMITS.items():
            run_dir = search_run(directory / f"run-{num_trials}", num_trials, num_steps=600)
            output = directory / f"{num_trials}.html"
            command = [sys.executable, "-m", "orchestrator", "report", str(run_dir), "--output", str(output)]
            times = [seconds_of(command) for _ in range(settings.repeats)]
            name, size_mb = f"report of {num_trials} trials", output.stat().st_size / 1e6
            within_s, within_mb = partial(_is_within, limit_s), partial(_is_within, limit_mb)
            report.add(median_figure(name, times, "s", target=f"<= {limit_s:g} s", is_met=within_s))
            report.add(median_figure(f"{name}, size", [size_mb], "MB", target=f"<= {limit_mb:g} MB", is_met=within_mb))
    report.write()


if __name__ == "__main__":
    main()
