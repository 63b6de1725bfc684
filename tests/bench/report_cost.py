"""What a report costs a trial, apart from waiting for the search: its evaluation, and its commit piece by piece.

One process, no Ray, no neighbour: the evaluation and the commit of a slot, timed with and without a profiler. A part of
`bench_gpu_share`.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.part_process import Row
from tests.bench.results_file import say
from tests.bench.share_runs import model_of

REPEATS = 5
PIECES = {
    "refuse non-finite": ("first_non_finite",),
    "describe state": ("flatten",),
    "write tensors": ("save_tensors", "save"),
    "of it, write()": ("<method 'write' of '_io.BufferedWriter' objects>",),
    "of it, to the host": ("<method 'cpu' of 'torch._C.TensorBase' objects>", "<method 'copy_' of"),
    "wait for the disk": ("<built-in method posix.fsync>",),
    "read back and hash": ("describe",),
    "remove old commits": ("_clear_away",),
}
"""What is looked for in the profile of a commit: functions by name, the first that is found counts."""


def report_cost(given: argparse.Namespace) -> Row:
    """Seconds of an evaluation and of a commit, of each size."""
    sizes = ("tiny",) if given.rehearse else ("7M", "34M")
    return {"repeats": REPEATS, "sizes": {size: _of(size, "cpu" if given.rehearse else "cuda") for size in sizes}}


def _of(size: str, device_name: str) -> Row:
    import torch

    from orchestrator.jobs import build_job
    from orchestrator.train import checkpoint

    params, micro_batch = model_of(size)
    device = torch.device(device_name)
    job = build_job("language", {**params, "eval_windows": 256})
    job.prepare()
    with device:
        model = job.build_model()
    optimizer = job.build_optimizer(model)
    terms = job.loss(model, job.batch(list(range(micro_batch)), device))
    (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def evaluate() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            job.evaluate(model, device)

    with tempfile.TemporaryDirectory(prefix="report-", dir=Path("/tmp")) as directory:
        numbers = iter(range(100))

        def commit() -> None:
            extra = {"step": next(numbers)}
            checkpoint.commit(
                Path(directory), model=model, optimizer=optimizer, extra=extra, rank=0, world_size=1, group=None
            )

        commit()
        evaluate()
        found: Row = {
            "num_parameters": sum(param.numel() for param in model.parameters()),
            "evaluate_s": _times(evaluate),
            "commit_s": _times(commit),
            "commit_pieces_s": _pieces(commit),
        }
    say(f"{size}: {found}")
    return found


def _times(work: Callable[[], None]) -> list[float]:
    found = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - began_s)
    return found


def _pieces(work: Callable[[], None]) -> dict[str, float]:
    """Seconds per call of `work` that the profiler saw in each piece, what it calls included; Python runs slower so."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(REPEATS):
        work()
    profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    by_name: dict[str, float] = {}
    for (_, _, name), (_, _, _, cumulative_s, _) in stats.items():
        by_name[name] = max(by_name.get(name, 0.0), cumulative_s)
    pieces = {}
    for piece, names in PIECES.items():
        times = [seconds for known, seconds in by_name.items() if any(known.startswith(name) for name in names)]
        pieces[piece] = max(times, default=0.0) / REPEATS
    return {**pieces, "all": by_name.get("commit", 0.0) / REPEATS}
