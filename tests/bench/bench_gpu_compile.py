"""What compiling a trial's steps takes: the first time on a node, of what lies on disk, and with another batch.

Each time is that of a process of its own, which does nothing else, for forward and backward pass of one micro-batch in
bf16 with kernels for any batch. Without a GPU it compiles a tiny model for the CPU, which only shows that it works.
`python -m tests.bench.bench_gpu_compile`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.gpu_job import SIZES
from tests.bench.hand_trials import TINY
from tests.bench.orchestrated import scratch
from tests.bench.results_file import ROOT, Report, median_figure, options, say

BATCHES = (16, 32)


def compile_here(size: str) -> dict[str, float]:
    """Seconds of this process for each batch in turn."""
    import torch

    from orchestrator.jobs import build_job
    from orchestrator.policies.tier import Tier
    from orchestrator.train.precision.tiers import install, lowered, set_tier
    from orchestrator.train.step_mode.compiled import Ahead, Compilation

    device, tier = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Tier.BF16
    job = build_job("language", SIZES[size][0] if size in SIZES else TINY)
    job.prepare()
    with device:
        model = job.build_model()
    install(model, keeps_weights=True)
    set_tier(model, tier)
    one = Compilation(job, model, Ahead(1, 1, turns_batch=True))
    found = {}
    for size_of_batch in BATCHES:
        on_host = job.batch(range(size_of_batch), torch.device("cpu"))
        batch = tuple(torch.empty_like(part, device=device).copy_(part) for part in on_host)
        began_s = time.perf_counter()
        with one.measured((size_of_batch, tier)):
            with lowered(tier, device):
                terms = one.loss(model, batch)
            terms.loss_sum.backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()
        found[str(size_of_batch)] = time.perf_counter() - began_s
    return found


def in_a_process(size: str, kernels: Path) -> dict[str, float]:
    """The same in a process of its own, which keeps kernels there."""
    from orchestrator.train.step_mode.compiled import CACHE

    command = [sys.executable, "-m", __spec__.name, "--one", size]
    environment = {**os.environ, CACHE: str(kernels)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"compiling {size} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(report: Report, size: str, directory: Path) -> None:
    """First and further processes, each pair with an empty directory."""
    rows: list[dict[str, Any]] = []
    for number in range(report.options.repeats):
        kernels = directory / f"{size}-{number}"
        rows.append({"first": in_a_process(size, kernels), "next": in_a_process(size, kernels)})
    report.raw[size] = rows
    for which, words in (("first", "the first time"), ("next", "of what lies on disk")):
        for batch, more in zip(map(str, BATCHES), ("", ", another batch then"), strict=True):
            report.add(median_figure(f"{size}: {words}{more}", [row[which][batch] for row in rows], "s"))


def main() -> None:
    """Compile every size that this machine can."""
    import torch

    report = Report(options("gpu_compile", repeats=3))
    sizes = ("7M", "34M") if torch.cuda.is_available() and not report.options.is_quick else ("tiny",)
    with scratch() as directory:
        for size in sizes:
            measure(report, size, directory)
    report.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        say(json.dumps(compile_here(sys.argv[2])))
    else:
        main()
