"""The same as `guarded_trial` on two ranks over gloo, each a process of its own, with faults planted in one of them.

Processes are spawned, so a fault is named by what makes it: a function of the module that is called in the process of
its rank. Used by `bench_precision`.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from orchestrator.train.groups import Groups
from orchestrator.train.stepper import Stepper
from tests.bench.guarded_trial import Course, Recipe, run

NUM_RANKS = 2

MakeFault = Callable[[], Callable[[Stepper, int], None]]


@dataclass(frozen=True, slots=True)
class _Work:
    """What both ranks are told. `micro_batch` of the recipe is that of one rank."""

    recipe: Recipe
    fault: MakeFault | None
    fault_rank: int
    directory: str


def run_ranks(recipe: Recipe, fault: MakeFault | None = None, fault_rank: int = 1) -> Course:
    """Run the recipe on two ranks; the fault is in one of them. Returns what rank 0 saw."""
    with tempfile.TemporaryDirectory() as directory:
        work = _Work(recipe, fault, fault_rank, directory)
        spawn(_rank, args=(work,), nprocs=NUM_RANKS)  # type: ignore[no-untyped-call]
        course = torch.load(Path(directory) / "course.pt", weights_only=False)
    assert isinstance(course, Course)
    return course


def _rank(rank: int, work: _Work) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{work.directory}/store", NUM_RANKS)
    timeout = datetime.timedelta(minutes=2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timeout)
    recipe = work.recipe
    if work.fault is not None and rank == work.fault_rank:
        recipe = replace(recipe, before_step=work.fault())
    course = run(recipe, Groups(rank, NUM_RANKS, torch.device("cpu")).ranks)
    if rank == 0:
        torch.save(course, Path(work.directory) / "course.pt")
    dist.barrier()
    os._exit(0)  # with gloo a normal exit aborts now and then while Python shuts down
