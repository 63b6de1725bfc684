"""What the policy's predictions are worth: changes of each dial in the demo, predicted and realised gains.

Run with `python -m tests.bench.bench_demo` on an idle machine; a demo takes about a minute.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.control.journal import read
from tests.bench.results_file import ROOT, Figure, Report, median_figure, options, say

DIALS = ("share", "batch", "precision")


def main() -> None:
    """Run the demo some times and read its journals."""
    report = Report(options("demo", repeats=3))
    gains: list[dict[str, Any]] = []
    changes: dict[str, list[int]] = {dial: [] for dial in DIALS}
    seconds = []
    with tempfile.TemporaryDirectory(prefix="bench-demo-") as directory:
        for number in range(report.options.repeats):
            began_s = time.monotonic()
            run_dir = _run(Path(directory), f"demo{number}")
            seconds.append(time.monotonic() - began_s)
            entries = list(read(run_dir / "journal.jsonl"))
            gains += [entry for entry in entries if entry["kind"] == "gain"]
            for dial in DIALS:
                changes[dial].append(sum(dial in entry["dials"] for entry in entries if entry["kind"] == "ack"))
    report.raw["gains"] = gains
    report.add(
        median_figure("the demo, whole command", seconds, "s", target="<= 90 s", is_met=lambda v, _l, _h: v <= 90)
    )
    for dial in DIALS:
        counts = [float(count) for count in changes[dial]]
        report.add(
            median_figure(
                f"changes of {dial} applied",
                counts,
                "changes",
                target=">= 2 each time",
                is_met=lambda _v, low, _h: low >= 2,
            )
        )
        own = [entry["realised"] for entry in gains if dial in entry["dial"].split("+")]
        if own:
            name = f"realised gain of a change of {dial}"
            report.add(
                median_figure(name, own, "ratio - 1", target=">= 0", is_met=lambda value, _low, _high: value >= 0)
            )
    report.add(_correlation([entry for entry in gains if entry["predicted"] is not None]))
    report.write()


def _run(directory: Path, name: str) -> Path:
    command = [sys.executable, "-m", "orchestrator", "run", str(ROOT / "demo.yaml"), "--quiet"]
    command += ["--set", f"storage={directory}", "--set", f"name={name}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    say(f"  {name} done")
    return directory / name


def _correlation(gains: list[dict[str, Any]]) -> Figure:
    """Of the logarithms of predicted and realised gains: gains multiply."""
    pairs = [(math.log1p(entry["predicted"]), math.log1p(entry["realised"])) for entry in gains]
    value = statistics.correlation(*zip(*pairs, strict=True)) if len(pairs) > 2 else 0.0
    return Figure(
        name=f"correlation of predicted and realised gains, {len(pairs)} changes",
        value=value,
        statistic="Pearson",
        unit="",
        low=value,
        high=value,
        spread="none",
        values=[value],
        target="> 0",
        is_met=value > 0,
    )


if __name__ == "__main__":
    main()
