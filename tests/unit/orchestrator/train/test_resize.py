"""One rank, then two, then one again, from commit to commit: the same losses, and every sample exactly once."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from orchestrator.control.orders import Outcome, SlotOrder, Status, StopMode
from orchestrator.jobs import build_job
from orchestrator.policies.plan import on_ranks
from orchestrator.telemetry.record import StepArray
from orchestrator.train.groups import Ranks
from tests.unit.orchestrator.train.links import ONE_RANK, Script, grant, loop, order

BATCH = 8
LEAVE = 13
"""Steps of an attempt that moves on."""


def attempt(ranks: Ranks, directory: Path, number: int, resume_from: str | None) -> tuple[Outcome, StepArray]:
    """One attempt of the trial on one rank; the first two are told to move on."""
    first = order_of(ranks.world_size, directory, number, resume_from)
    assert first.trial is not None
    script = Script(first)
    if number < 2 and ranks.rank == 0:
        script.at(LEAVE, lambda now: replace(now, stop=StopMode.RESIZE))
    torch.manual_seed(first.trial.seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    outcome = loop(script, job, ranks=ranks).run()
    return outcome, script.records


def order_of(num_ranks: int, directory: Path, number: int, resume_from: str | None) -> SlotOrder:
    first = order(directory, num_ranks=1, samples_per_report=240)
    assert first.trial is not None
    start = on_ranks(first.trial.start, num_ranks, first.trial.limits.max_micro_batch)
    trial = replace(first.trial, attempt=number, resume_from=resume_from, start=start)
    return replace(first, trial=trial, grant=grant(num_ranks=num_ranks, micro_batch=BATCH // num_ranks))


def two(rank: int, directory: str, resume_from: str) -> None:
    """The second attempt, on one of its two ranks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=30))
    ranks = Ranks(
        rank=rank,
        world_size=2,
        device=torch.device("cpu"),
        group=dist.new_group(backend="gloo"),
        mesh=init_device_mesh("cpu", (2,)),
    )
    outcome, records = attempt(ranks, Path(directory), 1, resume_from)
    assert outcome.status is Status.INTERRUPTED
    np.save(f"{directory}/two-{rank}.npy", records)
    if rank == 0:
        Path(f"{directory}/commit").write_text(str(outcome.checkpoint))
    dist.barrier()
    os._exit(0)  # as in two_ranks.py: a thread of gloo that lets go of a tensor while Python shuts down aborts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> StepArray:
    outcome, records = attempt(ONE_RANK, tmp_path_factory.mktemp("undisturbed"), 2, None)
    assert outcome.status is Status.DONE
    return records


def test_one_two_one_ranks_train_as_one_does(undisturbed: StepArray, tmp_path: Path) -> None:
    outcome, before = attempt(ONE_RANK, tmp_path, 0, None)
    assert (outcome.status, outcome.num_samples) == (Status.INTERRUPTED, LEAVE * BATCH)
    start_processes(two, args=(str(tmp_path), str(outcome.checkpoint)), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [np.load(tmp_path / f"two-{rank}.npy") for rank in range(2)]
    outcome, after = attempt(ONE_RANK, tmp_path, 2, (tmp_path / "commit").read_text())
    assert outcome.status is Status.DONE
    course = np.concatenate([before, ranks[0], after])
    assert set(ranks[0]["num_workers"]) == {2}
    assert set(course["num_samples"]) == {BATCH}
    assert (course["cursor"] == np.arange(len(course)) * BATCH).all(), "every sample once, in order"
    assert len(course) == len(undisturbed)
    loss = np.concatenate([before["loss"], (ranks[0]["loss"] + ranks[1]["loss"]) / 2, after["loss"]])
    np.testing.assert_allclose(loss, undisturbed["loss"], rtol=1e-5)
    np.testing.assert_allclose(course["learning_rate"], undisturbed["learning_rate"], rtol=1e-12)
