"""CPU seconds a rank really uses under a CPU share, while it trains: 5 s each at 0.25, 0.5, 1 and 1.5 cores.

Each run is a process of its own that trains the language job through the same mechanism, and with the same environment,
as a rank does. What it used is read from the process by its own clock; wall time from before the first step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from orchestrator.share.cpu_cores import WORKER_ENVIRONMENT, CpuCores
from tests.bench.language_job import PARAMS, BareLoop
from tests.bench.results_file import ROOT, Options, Report, median_figure, options

AMOUNTS = (0.25, 0.5, 1.0, 1.5)
SECONDS = 5.0
TOLERANCE = 0.1
MICRO_BATCH = 12


def train(amount: float, seconds: float) -> dict[str, float]:
    """Train under the share in this process; CPU seconds used over those granted."""
    import torch

    from orchestrator.jobs import build_job

    job = build_job("language", PARAMS)
    job.prepare()
    loop = BareLoop(job, "plain", MICRO_BATCH, 0, 1)
    loop.run(5)
    share = CpuCores()
    share.apply(tuple(range(2 if amount > 1 else 1)), amount)
    steps = 0
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    while time.monotonic() - began_s < seconds:
        loop.run(1)
        share.hold_back()
        steps += 1
    wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
    share.release()
    return {"amount": amount, "wall_s": wall_s, "cpu_s": cpu_s, "steps": steps, "threads": torch.get_num_threads()}


def main() -> None:
    """Measure each share in processes of their own."""
    if len(sys.argv) == 4 and sys.argv[1] == "--child":
        sys.stdout.write(json.dumps(train(float(sys.argv[2]), float(sys.argv[3]))) + "\n")
        return
    settings: Options = options("cpu_share", repeats=5)
    report = Report(settings)
    seconds = 1.0 if settings.is_quick else SECONDS
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    for amount in AMOUNTS:
        runs = []
        for _ in range(settings.repeats):
            command = [sys.executable, "-m", "tests.bench.bench_cpu_share", "--child", str(amount), str(seconds)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))
        report.raw[f"{amount:g} cores"] = runs
        report.add(
            median_figure(
                f"CPU seconds used over granted, {amount:g} cores",
                [run["cpu_s"] / (amount * run["wall_s"]) for run in runs],
                "x",
                target=f"every one within {TOLERANCE:.0%}",
                is_met=lambda _value, low, high: low >= 1 - TOLERANCE and high <= 1 + TOLERANCE,
            )
        )
    report.write()


if __name__ == "__main__":
    main()
