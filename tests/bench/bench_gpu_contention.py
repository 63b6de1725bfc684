"""Whether SM groups are really a process's own: two processes under MPS, on disjoint groups and on the same ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.bench.results_file import ROOT, Report, median_figure, options

PAIRS = (("0-7", "8-14"), ("0-11", "12-14"), ("0-3", "4-14"), ("0-7", "0-7"))


def run_pair(pair: tuple[str, str], environment: dict[str, str], seconds: float) -> list[float]:
    """TFLOP/s of each of two processes that run at the same time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.gpu_contention", "--groups", groups, "--seconds", str(seconds)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for groups in pair
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"a process of {pair} did not get ready")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [float(json.loads(output)["tflops"]) for output in outputs]


def main() -> None:
    """All pairs, so many times."""
    from orchestrator.share.mps import OwnMps

    settings = options("gpu_contention", repeats=2)
    report = Report(settings)
    own = OwnMps()
    environment = own.start().environment
    rows: list[dict[str, Any]] = []
    try:
        for pair in PAIRS:
            found = [run_pair(pair, environment, 1.0 if settings.is_quick else 3.0) for _ in range(settings.repeats)]
            rows.append({"pair": list(pair), "tflops": found})
            report.add(median_figure(f"groups {pair[0]} and {pair[1]}", [sum(each) for each in found], "TFLOP/s"))
    finally:
        own.stop()
    disjoint = min(sum(each) for row in rows[:3] for each in row["tflops"])
    same = max(sum(each) for each in rows[3]["tflops"])
    report.add(
        median_figure("disjoint / same", [disjoint / same], "x", target="> 1.2", is_met=lambda v, _l, _h: v > 1.2)
    )
    report.raw |= {"pairs": rows}
    report.write()


if __name__ == "__main__":
    main()
