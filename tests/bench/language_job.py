"""The work of the benchmarks: the language job, sized so that one step takes as long as asked on one core.

Also the loop one would write by hand for it (`BareLoop`), which the orchestrator is measured against. `--ranks` of
`main` runs that loop in plain processes, without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.results_file import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from orchestrator.jobs.job import Job

PARAMS: dict[str, Any] = {"width": 128, "layers": 2, "context": 64}
"""0.47 million parameters: large enough that what scales with parameters (clipping, noise scale) is not for free."""

MAX_GRAD_NORM = 1.0
_CALIBRATION_STEPS = 40


def sized_micro_batch(step_ms: float) -> int:
    """Samples per step with which a bare step of one thread takes about `step_ms` on this machine, right now."""
    times = {}
    for micro_batch in (4, 12):
        arguments = ["--micro-batch", str(micro_batch), "--blocks", "1", "--steps", str(_CALIBRATION_STEPS)]
        times[micro_batch] = run_outside(1, ["plain"], arguments)[0]["seconds"] / _CALIBRATION_STEPS * 1e3
    per_sample_ms = (times[12] - times[4]) / 8
    return max(1, int(4.5 + (step_ms - times[4]) / max(per_sample_ms, 1e-3)))


class BareLoop:
    """Forward, backward, clip, step, by hand: no boundary, no telemetry, no dials, plain layers.

    Args:
        job: what is trained.
        form: 'plain' on one rank; 'ddp' or 'fsdp2' on several.
        micro_batch: samples per rank and step.
        rank, world_size: of this process.
    """

    def __init__(self, job: Job, form: str, micro_batch: int, rank: int, world_size: int) -> None:
        import numpy as np
        import torch

        self._job, self._micro_batch, self._rank, self._world_size = job, micro_batch, rank, world_size
        torch.manual_seed(0)
        self._device = torch.device("cpu")
        self._model = _wrapped(job, form, world_size)
        self._optimizer = job.build_optimizer(self._model)
        self._order = np.random.default_rng(0).permutation(job.num_train_samples)
        self._position = 0

    def run(self, num_steps: int) -> float:
        """Train so many steps; returns the last loss."""
        import torch

        loss = 0.0
        for _ in range(num_steps):
            terms = self._job.loss(self._model, self._job.batch(self._next_indices(), self._device))
            mean = terms.loss_sum / terms.num_elements
            mean.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            loss = float(mean.detach())
        return loss

    def _next_indices(self) -> Any:
        global_batch = self._micro_batch * self._world_size
        if self._position + global_batch > len(self._order):
            self._position = 0
        start = self._position + self._rank * self._micro_batch
        self._position += global_batch
        return self._order[start : start + self._micro_batch]


def _wrapped(job: Job, form: str, world_size: int) -> torch.nn.Module:
    """The model in the form in which it is trained by hand."""
    model = job.build_model()
    if form == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if form == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh

        from orchestrator.train import fsdp

        fsdp.shard(model, job.blocks(model), init_device_mesh("cpu", (world_size,)))
    return model


def forms(num_ranks: int) -> list[str]:
    """The ways to write the loop by hand; the fastest one counts."""
    return ["plain"] if num_ranks == 1 else ["ddp", "fsdp2"]


def run_outside(num_ranks: int, which: Sequence[str], arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Blocks of the bare loop in plain processes, one core each: [{form, seconds}], as rank 0 measured them."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        common = [sys.executable, "-m", "tests.bench.language_job", "--store", f"{directory}/store"]
        common += ["--ranks", str(num_ranks), "--forms", *which]
        processes = [
            subprocess.Popen(
                [*common, *arguments, "--rank", str(rank), "--core", str(cores[rank % len(cores)])],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a bare rank failed: {[process.returncode for process in processes]}")
    blocks: list[dict[str, Any]] = json.loads(outputs[0])
    return blocks


def main() -> None:
    """One plain process of the bare loop; prints its blocks as JSON."""
    parser = argparse.ArgumentParser()
    for name in ("--ranks", "--rank", "--core", "--micro-batch", "--blocks", "--steps"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--forms", nargs="+", required=True)
    parser.add_argument("--store", required=True)
    given = parser.parse_args()
    os.sched_setaffinity(0, {given.core})
    import torch
    import torch.distributed as dist

    from orchestrator.jobs import build_job

    torch.set_num_threads(1)
    if given.ranks > 1:
        store = f"file://{given.store}"
        dist.init_process_group(
            "gloo", init_method=store, rank=given.rank, world_size=given.ranks, timeout=timedelta(seconds=120)
        )
    job = build_job("language", PARAMS)
    job.prepare()
    loops = {form: BareLoop(job, form, given.micro_batch, given.rank, given.ranks) for form in given.forms}
    for loop in loops.values():
        loop.run(20)
    blocks = []
    for _ in range(given.blocks):
        for form, loop in loops.items():
            began_s = time.perf_counter()
            loop.run(given.steps)
            blocks.append({"form": form, "seconds": time.perf_counter() - began_s})
    if given.ranks > 1:
        dist.destroy_process_group()
    sys.stdout.write(json.dumps(blocks))


def steps_per_s(blocks: Sequence[dict[str, Any]], form: str, num_steps: int) -> list[float]:
    """Steps per second of every block of one form."""
    return [num_steps / block["seconds"] for block in blocks if block["form"] == form]


def fastest(blocks: Sequence[dict[str, Any]], which: Sequence[str]) -> str:
    """The form with the smallest median time."""
    return min(which, key=lambda form: statistics.median(b["seconds"] for b in blocks if b["form"] == form))


def corpus_is_there() -> bool:
    """Whether the text the job trains on can be read; every benchmark needs it."""
    from orchestrator.jobs.corpus import standard_library

    return Path(standard_library()).is_dir()


if __name__ == "__main__":
    main()
