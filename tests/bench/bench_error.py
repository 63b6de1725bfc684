"""Seconds from the failing line of a user's training to its traceback on the screen, and to the exit code.

A function whose every trial raises, as one trial and as a search of twelve; each trial notes the time just before it
raises. The clock begins with the last of these: the search goes on until trials are known to fail alike.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.bench.results_file import ROOT, Report, median_figure, options

TRAINING = """
import time
from pathlib import Path

import torch


def boom(lr):
    weights = torch.ones(3)
    with Path(NOTES).open("a") as notes:
        notes.write(f"{time.time()}\\n")
    return weights + undefined_name
"""
LIMIT_S = 5.0


def failing_run(folder: Path, num_trials: int) -> dict[str, Any]:
    """One run; seconds from the last failing line to the traceback on standard output, and to the exit."""
    notes = folder / "notes.txt"
    (folder / "bench_error_training.py").write_text(TRAINING.replace("NOTES", repr(str(notes))))
    content = {
        "name": "bad",
        "storage": str(folder / "runs"),
        "job": {"name": "bench_error_training:boom", "import_paths": [str(folder)]},
        "search": {
            "metric": "loss", "mode": "min", "num_trials": num_trials, "max_concurrent": 2,
            "space": {"lr": {"uniform": [0.1, 0.2]}},
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-u", "-m", "orchestrator", "run", str(folder / "run.yaml"), "--plain"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen_s, lines = 0.0, []
    for line in process.stdout:
        lines.append(f"{time.time():.2f} {line}")
        if "return weights + undefined_name" in line and not seen_s:
            seen_s = time.time()
    code = process.wait()
    ended_s = time.time()
    failed_s = float(notes.read_text().split()[-1])
    if code != 1 or not seen_s:
        raise RuntimeError(f"exit code {code}, traceback {'seen' if seen_s else 'missing'}:\n{''.join(lines)}")
    return {"traceback_s": seen_s - failed_s, "exit_s": ended_s - failed_s, "failed_s": failed_s, "lines": lines}


def main() -> None:
    report = Report(options=options("error", repeats=3))
    for num_trials in (1, 12):
        rows = []
        for _ in range(report.options.repeats):
            with tempfile.TemporaryDirectory(prefix="error-") as folder:
                rows.append(failing_run(Path(folder), num_trials))
        report.raw[f"{num_trials} trials"] = rows
        for name, what in (("traceback_s", "traceback on the screen"), ("exit_s", "exit code")):
            report.add(
                median_figure(
                    f"failing line to {what}, {num_trials} trial{'s' * (num_trials > 1)}",
                    [row[name] for row in rows],
                    "s",
                    target=f"<= {LIMIT_S:g} s, all",
                    is_met=lambda _value, _low, high: high <= LIMIT_S,
                )
            )
    report.write()


if __name__ == "__main__":
    main()
