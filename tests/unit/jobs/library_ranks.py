"""Models of libraries on two ranks, in processes of their own; losses of whole batches go to a file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from orchestrator.jobs import JobKey, build_job
from orchestrator.train.groups import Groups, Ranks
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK, order

WORLD_SIZE = 2
MODELS = "tests.unit.jobs.library_models"
TRAININGS = {
    "lightning": (JobKey(path=f"{MODELS}:Classifier", data=f"{MODELS}:Points"), "val_loss"),
    "huggingface": (JobKey(path=f"{MODELS}:gpt2", data=f"{MODELS}:sums", args={"learning_rate": 1e-2}), "eval_loss"),
}


def norms_of(name: str, ranks: Ranks) -> list[float]:
    """Gradient norms of eight steps of 16 samples; several ranks evaluate too."""
    key, metric = TRAININGS[name]
    trial = order(Path(), num_ranks=ranks.world_size).trial
    assert trial is not None
    start = replace(trial.start, micro_batch=16 // ranks.world_size)
    trial = replace(trial, start=start, samples_per_report=128, max_reports=1, metric=metric)
    torch.manual_seed(3)
    stepper = Stepper(trial, build_job(key.text, {}), ranks)
    norms = [stepper.step().grad_norm for _ in range(8)]
    if ranks.world_size > 1:  # metrics of torchmetrics ask all processes of the default group
        assert math.isfinite(stepper.evaluate()[metric])
    return norms


def main(rank: int, directory_name: str) -> None:
    """One of two ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    directory = Path(directory_name)
    store = FileStore(str(directory / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE, store=store, timeout=timedelta(seconds=60))
    ranks = Groups(rank, WORLD_SIZE, torch.device("cpu")).ranks
    results = {name: {"shared": norms_of(name, ranks)} for name in TRAININGS}
    if rank == 0:
        for name, found in results.items():
            found["alone"] = norms_of(name, ONE_RANK)
        (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts while Python shuts down
