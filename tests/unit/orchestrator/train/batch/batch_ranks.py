"""What the two-rank tests of batches run, in processes of their own; results go to a file.

One start of two processes serves all cases, because starting torch is most of the time.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from orchestrator.control.orders import Outcome, SlotOp, SlotOrder, Status, TrialOrder
from orchestrator.control.rendezvous import agree
from orchestrator.jobs import build_job
from orchestrator.jobs.job import Job
from orchestrator.policies.plan import Settings, TrialId
from orchestrator.policies.snapshot import DialLimits
from orchestrator.policies.tier import Tier
from orchestrator.train import fsdp
from orchestrator.train.batch.noise import weights_of
from orchestrator.train.batch.rank_noise import RankNoise
from orchestrator.train.boundary import Boundary
from orchestrator.train.groups import Groups, Ranks
from orchestrator.train.isolation import ProcessState
from orchestrator.train.serve import Server
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.batch.overflows import OverflowingJob
from tests.unit.orchestrator.train.links import FakeShare, Script, grant, order

WORLD_SIZE = 2
GLOBAL_BATCH = 24
SPLITS = {1: ((24, 1), (8, 3), (5, 5), (3, 8)), 2: ((12, 1), (4, 3), (5, 3))}
"""(micro-batch, accumulation) per rank for each number of ranks; 5 does not divide."""
NUM_STEPS = 50
OVERFLOWS = [("forward", 13), ("backward", 33), ("optimizer", 33)]
"""Before the first commit (step 20) and after it."""


def train_split(ranks: Ranks, micro_batch: int, grad_accum: int) -> list[float]:
    """Losses over the whole global batch of every step."""
    start = Settings(share=1.0, micro_batch=micro_batch, grad_accum=grad_accum, tier=Tier.FP32, num_workers=1)
    params = {"width": 16, "layers": 1, "heads": 2, "context": 16, "max_bytes": 200_000}
    trial = TrialOrder(
        trial_id=TrialId("t"),
        attempt=0,
        seed=5,
        job="language",
        params=params,
        start=_with_batch(start, GLOBAL_BATCH),
        limits=DialLimits(
            min_share=1.0,
            max_share=1.0,
            min_global_batch=1,
            max_global_batch=99,
            max_micro_batch=99,
            tiers=(Tier.FP32,),
        ),
        samples_per_report=GLOBAL_BATCH * NUM_STEPS,
        max_reports=1,
        directory="",
        resume_from=None,
        num_reports_done=0,
    )
    job = build_job("language", params)
    job.prepare()
    torch.manual_seed(5)
    stepper = Stepper(trial, job, ranks)
    stepper.settings = _with_batch(start, GLOBAL_BATCH)
    losses = []
    for _ in range(NUM_STEPS):
        result = stepper.step()
        loss = torch.tensor([result.loss / ranks.world_size], dtype=torch.float64)
        if ranks.group is not None:
            dist.all_reduce(loss, group=ranks.group)
        losses.append(float(loss))
    return losses


class _Exact(Settings):
    """Settings whose global batch is given and not the product: the last micro-batch of a rank is shorter."""

    @property
    def global_batch(self) -> int:
        return GLOBAL_BATCH


def _with_batch(settings: Settings, global_batch: int) -> Settings:
    if settings.micro_batch * settings.grad_accum * settings.num_workers == global_batch:
        return settings
    return _Exact(
        share=1.0,
        micro_batch=settings.micro_batch,
        grad_accum=settings.grad_accum,
        tier=settings.tier,
        num_workers=settings.num_workers,
    )


class Linear3(nn.Module):
    """A small regression whose per-sample gradients are cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 9), nn.Linear(9, 5)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[1](torch.tanh(self.layers[0](x)))
        return out


def pool_of(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 7, generator=generator)
    return x, x[:, :5] + 0.7 * torch.randn(count, 5, generator=generator)


def true_terms(model: nn.Module, weights: list[Tensor] | None, pool: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """tr(Sigma) and |G|^2 from the gradient of every sample, weighed as the estimator does."""
    rows = []
    for x, y in zip(*pool, strict=True):
        model.zero_grad()
        (model(x[None]) - y).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if weights:
            grads = [g * w for g, w in zip(grads, weights, strict=True)]
        rows.append(torch.cat([g.flatten() for g in grads]))
    model.zero_grad()
    gradients = torch.stack(rows)
    mean = gradients.mean(0)
    return float((gradients - mean).square().sum(1).mean()), float(mean.square().sum())


def rank_noise(ranks: Ranks, optimizer_name: str, grad_scale: float, num_draws: int = 240) -> dict[str, Any]:
    """Draws of the estimator over random batches of uneven parts, at one point of training, and the truth there."""
    pool = pool_of(256)
    counts = (13, 11)
    torch.manual_seed(4)
    alone, shared = Linear3(), Linear3()
    shared.load_state_dict(alone.state_dict())
    fsdp.shard(shared, list(shared.layers), ranks.mesh, min_unit_bytes=1)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}
    optimizers = [kinds[optimizer_name](model.parameters(), lr=0.003) for model in (alone, shared)]
    generator = torch.Generator().manual_seed(9)
    noise = RankNoise(shared, every=1)
    draws = []
    for number in range(num_draws + 20):
        chosen = torch.randint(len(pool[0]), (sum(counts),), generator=generator)
        mine = chosen[: counts[0]] if ranks.rank == 0 else chosen[counts[0] :]
        for model, part, scale in ((alone, chosen, 1.0), (shared, mine, grad_scale * ranks.world_size)):
            model.zero_grad()
            is_measured = model is shared and number >= 20
            if is_measured:
                noise.arm(is_elementwise=optimizer_name == "adam")
            loss = (model(pool[0][part]) - pool[1][part]).square().sum() / sum(counts)
            (loss * scale).backward()
        if number < 20:
            for model, optimizer in zip((alone, shared), optimizers, strict=True):
                if model is shared:
                    for param in model.parameters():
                        assert param.grad is not None
                        param.grad /= grad_scale
                optimizer.step()
            continue
        weights = weights_of(optimizers[1], shared.parameters())
        draw = noise.observe(
            fsdp.local_grads(shared.parameters()), counts, ranks.group, grad_scale=grad_scale, weights=weights
        )
        assert draw is not None
        draws.append((draw.noise_trace, draw.grad_sq))
    alone.zero_grad()
    (alone(pool[0]) - pool[1]).square().sum().backward()
    whole_weights = weights_of(optimizers[0], alone.parameters())
    return {"draws": draws, "truth": true_terms(alone, whole_weights, pool)}


class StoreLink(Script):
    """A slot's outside for several ranks: they leave through a store, and rank 0 says what comes next."""

    def __init__(self, first: SlotOrder, ranks: Ranks, store: Any) -> None:
        super().__init__(first)
        self._ranks, self._store = ranks, store
        self._num_left = 0
        self.failed_at_s = self.went_on_after_s = 0.0
        self.statuses: list[str] = []
        self.reasons: list[str] = []

    def begin(self, trial_id: TrialId, attempt: int) -> None: ...

    def leave(self, outcome: Outcome) -> Outcome:
        self._num_left += 1
        self.collect()
        self._store.set(f"left/{self._num_left}/{self._ranks.rank}", pickle.dumps(outcome))
        keys = [f"left/{self._num_left}/{rank}" for rank in range(self._ranks.world_size)]
        self._store.wait(keys, timedelta(seconds=10))
        agreed = agree({rank: pickle.loads(self._store.get(key)) for rank, key in enumerate(keys)})
        if agreed.status is Status.MEMORY:
            self.failed_at_s = time.monotonic()
        return agreed

    def finish(self, outcome: Outcome) -> None:
        self.collect()
        self.statuses.append(outcome.status.value)
        self.reasons.append(outcome.reason)
        if outcome.status is not Status.MEMORY:
            self._order = replace(self._order, op=SlotOp.CLOSE)
        else:
            trial, settings = self._order.trial, outcome.settings
            assert trial is not None
            assert settings is not None
            commits = (Path(trial.directory) / "checkpoints").glob("step-*")
            last = max(commits, key=lambda path: int(path.name.removeprefix("step-")), default=None)
            again = replace(trial, attempt=trial.attempt + 1, resume_from=None if last is None else str(last))
            dials = grant(2, 2, micro_batch=settings.micro_batch, grad_accum=settings.grad_accum)
            self._order = replace(self._order, trial=again, grant=dials)
        self.version += 1


def survive(groups: Groups, store: Any, directory: Path, place: str, at: int) -> dict[str, Any]:
    """A trial of two ranks in which rank 1 runs out of memory once; its records, and how long the way back took."""
    first = order(directory, num_ranks=WORLD_SIZE)
    link = StoreLink(first, groups.ranks, store)
    job = OverflowingJob(place, at if groups.ranks.rank == 1 else 10**9, fits=2, width=16, num_samples=512)
    went_on_at_s: list[float] = []
    add_record = link.outbox.add_record

    def timed(row: tuple[float, ...]) -> None:
        if link.failed_at_s and not went_on_at_s:
            went_on_at_s.append(time.monotonic())
        add_record(row)

    link.outbox.add_record = timed  # type: ignore[method-assign]
    boundary = Boundary(link, groups.ranks.rank, WORLD_SIZE, groups.ranks.group)

    def build(trial: TrialOrder) -> Job:
        return job

    server = Server(
        groups=groups, boundary=boundary, link=link, share=FakeShare(), clean=ProcessState.capture(), build=build
    )
    server.serve()
    if not link._records:
        raise RuntimeError(f"{place}-{at}: {link.statuses} {link.reasons}")
    return {
        "fired": job.num_fired,
        "statuses": link.statuses,
        "reasons": link.reasons,
        "away_s": went_on_at_s[0] - link.failed_at_s if went_on_at_s else None,
        "records": [
            [int(row["step"]), int(row["cursor"]), int(row["num_samples"]), int(row["micro_batch"]), float(row["loss"])]
            for row in link.records
        ],
    }


def main(rank: int, directory_name: str) -> None:
    """One of two ranks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    directory = Path(directory_name)
    store = FileStore(str(directory / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE, store=store, timeout=timedelta(seconds=30))
    groups = Groups(rank, WORLD_SIZE, torch.device("cpu"))
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    results: dict[str, Any] = {
        "alone": [train_split(alone, micro, accum) for micro, accum in SPLITS[1]] if rank == 0 else [],
        "splits": [train_split(groups.ranks, micro, accum) for micro, accum in SPLITS[2]],
        "noise": {name: rank_noise(groups.ranks, name, scale) for name, scale in (("sgd", 64.0), ("adam", 1.0))},
    }
    results["undisturbed"] = survive(groups, PrefixStore("u", store), directory / "u", "none", 10**9)
    for place, at in OVERFLOWS:
        name = f"{place}-{at}"
        results[name] = survive(groups, PrefixStore(name, store), directory / name, place, at)
    (directory / f"results-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # as in two_ranks.py: gloo sometimes aborts while Python shuts down
