"""The training loop on two gloo ranks: the same plan before the same step, and the same losses as on one rank."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from orchestrator.control.orders import Status, StopMode
from orchestrator.jobs import build_job
from orchestrator.policies.tier import Tier
from orchestrator.train.groups import Ranks
from tests.unit.orchestrator.train.links import Script, grant, loop, order


def train(rank: int, world_size: int, directory: str) -> None:
    """One rank of a run whose dials turn twice; saves its step records and acknowledgements."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    ranks = Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))
    if world_size > 1:
        store = FileStore(f"{directory}/store", world_size)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=30))
        group = dist.new_group(backend="gloo")
        ranks = replace(ranks, group=group, mesh=init_device_mesh("cpu", (world_size,)))
    first = order(Path(directory), num_ranks=world_size, samples_per_report=240)
    assert first.trial is not None
    script = Script(first)
    if rank == 0:
        for generation, (num_steps, micro, tier) in enumerate([(6, 16, Tier.FP32), (14, 8, Tier.BF16)], start=2):
            change = grant(generation, world_size, micro_batch=micro // world_size, tier=tier)
            script.at(num_steps, lambda now, change=change: replace(now, grant=change))  # type: ignore[misc]
    torch.manual_seed(first.trial.seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    outcome = loop(script, job, ranks=ranks).run()
    assert outcome.status is Status.DONE
    assert first.stop is StopMode.NONE
    np.save(f"{directory}/records-{rank}.npy", script.records)
    np.save(f"{directory}/acks-{rank}.npy", np.array([(ack.generation, ack.step) for ack in script.acks]))
    if world_size > 1:
        dist.barrier()
        os._exit(0)  # as in two_ranks.py: a thread of gloo that lets go of a tensor while Python shuts down aborts


def run(world_size: int, directory: Path) -> list[np.ndarray]:
    directory.mkdir()
    start_processes(train, args=(world_size, str(directory)), nprocs=world_size)  # type: ignore[no-untyped-call]
    return [np.load(directory / f"records-{rank}.npy") for rank in range(world_size)]


def test_two_ranks_apply_each_plan_before_the_same_step_and_agree_with_one_rank(tmp_path: Path) -> None:
    (one,) = run(1, tmp_path / "one")
    first, second = run(2, tmp_path / "two")
    for name in ("step", "generation", "cursor", "num_samples", "tier", "micro_batch"):
        assert (first[name] == second[name]).all(), f"ranks differ in {name}"
    assert sorted(set(first["generation"])) == [1, 2, 3]
    changed = [int(first["step"][first["generation"] == generation][0]) for generation in (2, 3)]
    assert 6 <= changed[0] <= 8
    assert 14 <= changed[1] <= 16
    acks = np.load(tmp_path / "two" / "acks-0.npy")
    assert acks.tolist() == [[1, 0], [2, changed[0]], [3, changed[1]]]
    assert len(np.load(tmp_path / "two" / "acks-1.npy")) == 0, "rank 0 speaks for all"
    # Until the first change both runs take the same samples in the same batches; later they change at other steps.
    both = slice(0, 6)
    mean = (first["loss"][both] + second["loss"][both]) / 2
    np.testing.assert_allclose(mean, one["loss"][both], rtol=2e-6)
    np.testing.assert_allclose(first["grad_norm"][both], one["grad_norm"][both], rtol=2e-5)
