"""A user's function on two gloo ranks with DistributedDataParallel: dials turn before the same step on both."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import orchestrator
from orchestrator.control.orders import Status
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import tier_code
from orchestrator.train.boundary import Boundary
from orchestrator.train.function.driver import FunctionDriver
from orchestrator.train.groups import Ranks
from tests.unit.orchestrator.train.function.test_driver import function_order
from tests.unit.orchestrator.train.links import FakeShare, Script, grant

SPOILT_AT = 22


def training(losses: list[float], *, num_ranks: int, spoils: bool) -> None:
    """As a `train_loop_per_worker` has it; one loss of rank 1 is not finite while it is computed in bf16."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    features = torch.randn(256, 8)
    labels = (features.sum(1) > 0).long()
    data, rank = TensorDataset(features, labels), dist.get_rank() if num_ranks > 1 else 0
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data, num_ranks, rank, shuffle=False)
    loader = DataLoader(data, batch_size=8 // num_ranks, sampler=sampler)
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    orchestrator.watch(wrapped, optimizer)
    for _ in range(orchestrator.num_reports(), 2):
        for x, y in loader:
            output = wrapped(x)
            loss = nn.functional.cross_entropy(output.float(), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if spoils and len(losses) == SPOILT_AT and output.dtype is torch.bfloat16 and rank == 1:
                (loss.detach() * float("nan") * next(model.parameters()).sum()).backward()  # type: ignore[no-untyped-call]
        orchestrator.report({"loss": losses[-1]})


def train(rank: int, num_ranks: int, directory: str, attempt: int) -> None:
    """One rank of an attempt; the second goes on from what the first has committed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    ranks = Ranks(rank=rank, world_size=num_ranks, device=torch.device("cpu"))
    if num_ranks > 1:
        store = FileStore(f"{directory}/store-{attempt}", num_ranks)
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store, timeout=timedelta(seconds=30))
        ranks = replace(ranks, group=dist.new_group(backend="gloo"))
    first = function_order(Path(directory) / "t")
    assert first.trial is not None
    begun = grant(1, num_ranks, micro_batch=8 // num_ranks)
    trial = replace(first.trial, start=begun.settings)
    if attempt:
        resume_from = f"{directory}/t/checkpoints/step-32"
        trial = replace(trial, attempt=attempt, resume_from=resume_from, num_reports_done=1)
    script = Script(replace(first, trial=trial, grant=begun))
    if rank == 0 and not attempt and num_ranks > 1:
        change = grant(2, num_ranks, micro_batch=8 // num_ranks, tier=Tier.BF16)
        script.at(12, lambda now: replace(now, grant=change))
    boundary = Boundary(script, rank, num_ranks, ranks.group)
    newest = boundary.cross() or boundary.wait()
    assert newest is not None
    losses: list[float] = []
    spoils = not attempt and num_ranks > 1
    outcome = FunctionDriver(
        newest,
        lambda: training(losses, num_ranks=num_ranks, spoils=spoils),
        ranks,
        boundary,
        script,
        FakeShare(),
    ).run()
    assert outcome.status is Status.DONE
    np.save(f"{directory}/records-{rank}-{attempt}.npy", script.records)
    np.save(f"{directory}/losses-{rank}-{attempt}.npy", np.array(losses))
    (Path(directory) / f"overrides-{rank}-{attempt}").write_text("\n".join(each.reason for each in script.overrides))
    if num_ranks > 1:
        dist.barrier()
        os._exit(0)  # as in two_ranks.py: a thread of gloo that lets go of a tensor while Python shuts down aborts


def run(num_ranks: int, directory: Path, attempt: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    directory.mkdir(exist_ok=True)
    start_processes(train, args=(num_ranks, str(directory), attempt), nprocs=num_ranks)  # type: ignore[no-untyped-call]
    return [
        (np.load(directory / f"records-{rank}-{attempt}.npy"), np.load(directory / f"losses-{rank}-{attempt}.npy"))
        for rank in range(num_ranks)
    ]


def test_two_ranks_turn_before_the_same_step_flee_together_and_go_on_from_one_state(tmp_path: Path) -> None:
    ((_, plain),) = run(1, tmp_path / "one")
    (first, first_losses), (second, second_losses) = run(2, tmp_path / "two")
    for name in ("step", "generation", "num_samples", "tier"):
        assert (first[name] == second[name]).all(), f"ranks differ in {name}"
    assert set(first["num_samples"]) == {8}, "of both ranks"
    assert set(first["micro_batch"]) == {4}
    cheap = np.flatnonzero(first["tier"] == tier_code(Tier.BF16))
    assert 12 <= cheap[0] <= 14
    assert SPOILT_AT <= cheap[-1] <= SPOILT_AT + 2, "one rank's loss sends both back"
    assert (np.diff(cheap) == 1).all()
    said = (tmp_path / "two" / "overrides-0-0").read_text()
    assert "the loss of a step is not finite in bf16: goes on in fp32" in said
    means = (first_losses + second_losses) / 2
    np.testing.assert_allclose(means[: cheap[0]], plain[: cheap[0]], rtol=2e-6)
    np.testing.assert_allclose(means, plain, rtol=2e-2)

    (again, again_losses), (_, other_losses) = run(2, tmp_path / "two", attempt=1)
    assert again["step"][0] == 32
    np.testing.assert_allclose((again_losses + other_losses) / 2, means[32:], rtol=2e-6)
