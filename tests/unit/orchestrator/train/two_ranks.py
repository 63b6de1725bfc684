"""What the two-rank tests run: a program of its own, because a process group needs real processes.

`python two_ranks.py RANK DIRECTORY` runs every case on both ranks, over gloo and a file store, and rank 0 writes what
the cases returned to `DIRECTORY/results.pt`. All cases share one start of torch, which is most of the time.
"""

import datetime
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orchestrator.errors import CheckpointError
from orchestrator.policies.tier import Tier
from orchestrator.train import checkpoint, fsdp
from orchestrator.train.batch.rank_noise import RankNoise
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.precision.loss_scale import LossScale
from orchestrator.train.precision.probe import ProbeSetup, probe
from orchestrator.train.precision.tiers import install, set_tier, tiers_in_use

WORLD_SIZE = 2
NUM_SAMPLES = 12


class TinyNet(nn.Module):
    """Odd sizes, so that the shards are uneven; a norm, so that not every parameter is a matrix."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 7), nn.GELU(), nn.LayerNorm(7), nn.Dropout(dropout)) for _ in range(5)
        )
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


def build(
    mesh: DeviceMesh | None, dropout: float = 0.0, min_unit_bytes: int = 1
) -> tuple[TinyNet, torch.optim.Optimizer]:
    torch.manual_seed(11)
    model = TinyNet(dropout)
    install(model)
    fsdp.shard(model, list(model.blocks), mesh, min_unit_bytes=min_unit_bytes)
    return model, torch.optim.AdamW(model.parameters(), lr=0.02)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(NUM_SAMPLES, 7, generator=generator), torch.randn(NUM_SAMPLES, 3, generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    grad_accum: int = 1,
    max_norm: float | None = 0.5,
) -> list[tuple[float, float]]:
    """(loss of all samples, gradient norm) of every step."""
    seen = []
    for step in steps:
        x, y = (part.chunk(world_size)[rank] for part in batch_of(step))
        loss_sum = torch.zeros(())
        for number, (x_part, y_part) in enumerate(zip(x.chunk(grad_accum), y.chunk(grad_accum), strict=True), start=1):
            fsdp.set_gradient_sync(model, number == grad_accum)
            loss = (model(x_part) - y_part).square().sum()
            (loss * world_size / NUM_SAMPLES).backward()
            loss_sum += loss.detach()
        if world_size > 1:
            dist.all_reduce(loss_sum)
        seen.append((float(loss_sum) / NUM_SAMPLES, float(fsdp.clip_and_norm(model.parameters(), max_norm))))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fsdp.full_named_parameters(model)}


def case_one_rank_against_two(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    alone, alone_optimizer = build(None)
    shared, shared_optimizer = build(mesh)
    # A block has 280 bytes: two units of two blocks, the fifth in the root's.
    grouped, grouped_optimizer = build(mesh, min_unit_bytes=500)
    return {
        "alone": train(alone, alone_optimizer, range(10)),
        "shared": train(shared, shared_optimizer, range(10), rank, WORLD_SIZE),
        "grouped": train(grouped, grouped_optimizer, range(10), rank, WORLD_SIZE),
        "num_units": [sum(isinstance(m, FSDPModule) for m in model.modules()) for model in (alone, shared, grouped)],
        "alone_parameters": parameters(alone),
        "shared_parameters": parameters(shared),
        "is_sharded": all(isinstance(p, DTensor) for p in shared.parameters()),
    }


def case_accumulation(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    results: dict[Any, Any] = {}
    for grad_accum in (1, 3):
        model, optimizer = build(mesh)
        results[grad_accum] = train(model, optimizer, range(6), rank, WORLD_SIZE, grad_accum)
    return results


def case_norm_without_clipping(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    alone, _ = build(None)
    shared, _ = build(mesh)
    x, y = batch_of(0)
    (alone(x) - y).square().mean().backward()
    (shared(x) - y).square().mean().backward()
    return {
        "alone": float(fsdp.clip_and_norm(alone.parameters(), None)),
        "shared": float(fsdp.clip_and_norm(shared.parameters(), None)),
        "sum_sq_alone": float(fsdp.sum_sq(fsdp.local_grads(alone.parameters()), None)),
        "sum_sq_shared": float(fsdp.sum_sq(fsdp.local_grads(shared.parameters()), dist.group.WORLD)),
    }


def case_tier_switch(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    steady, steady_optimizer = build(mesh)
    switched, optimizer = build(mesh)
    train(steady, steady_optimizer, range(4), rank, WORLD_SIZE)
    train(switched, optimizer, range(4), rank, WORLD_SIZE)
    held = {name: (id(p), id(optimizer.state[p]["exp_avg"])) for name, p in switched.named_parameters()}
    before = parameters(switched)
    changed = set_tier(switched, Tier.BF16)
    unchanged = all(torch.equal(before[name], value) for name, value in parameters(switched).items())
    with torch.no_grad():
        evaluated = switched(batch_of(0)[0])
    result = {
        "changed": changed,
        "in_use": {str(tier): count for tier, count in tiers_in_use(switched).items()},
        "parameters_unchanged": unchanged,
        "eval_dtype": str(evaluated.dtype),
        "eval_gap": float((evaluated - steady(batch_of(0)[0]).detach()).abs().max()),
        "steady": train(steady, steady_optimizer, range(4, 10), rank, WORLD_SIZE),
        "switched": train(switched, optimizer, range(4, 10), rank, WORLD_SIZE),
        "grad_dtypes": sorted({str(p.dtype) for p in switched.parameters()}),
    }
    after = {name: (id(p), id(optimizer.state[p]["exp_avg"])) for name, p in switched.named_parameters()}
    return {**result, "state_kept": held == after, "back": set_tier(switched, Tier.FP32)}


def case_a_block_that_is_a_linear_layer(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    install(model)
    fsdp.shard(model, list(model), mesh, min_unit_bytes=1)
    changed = set_tier(model, Tier.BF16)
    model(torch.randn(4, 8)).sum().backward()
    return {
        "changed": changed,
        "survived": all(isinstance(layer, PrecisionLinear) for layer in model),
        "grad_dtypes": {str(p.grad.dtype) for p in model.parameters() if p.grad is not None},
    }


def case_resume_on_as_many_ranks(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    model, optimizer = build(mesh, dropout=0.3)
    torch.manual_seed(100 + rank)
    train(model, optimizer, range(4), rank, WORLD_SIZE)
    path = checkpoint.commit(
        directory,
        model=model,
        optimizer=optimizer,
        extra={"step": 4},
        rank=rank,
        world_size=WORLD_SIZE,
        group=dist.group.WORLD,
    )
    straight = train(model, optimizer, range(4, 8), rank, WORLD_SIZE)
    again, again_optimizer = build(mesh, dropout=0.3)
    torch.manual_seed(0)
    extra = checkpoint.load(
        path, model=again, optimizer=again_optimizer, rank=rank, world_size=WORLD_SIZE, group=dist.group.WORLD
    )
    resumed = train(again, again_optimizer, range(4, 8), rank, WORLD_SIZE)
    wanted, got = parameters(model), parameters(again)
    return {
        "extra": extra,
        "straight": straight,
        "resumed": resumed,
        "parameters_equal": all(torch.equal(wanted[name], got[name]) for name in wanted),
        "files": sorted(path.name for path in path.iterdir()),
    }


def case_resume_on_other_numbers_of_ranks(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    everyone: dict[str, Any] = {"rank": rank, "world_size": WORLD_SIZE, "group": dist.group.WORLD}
    alone: dict[str, Any] = {"rank": 0, "world_size": 1, "group": None}
    model, optimizer = build(mesh)
    losses = train(model, optimizer, range(3), rank, WORLD_SIZE)
    first = checkpoint.commit(directory / "two", model=model, optimizer=optimizer, extra={"step": 3}, **everyone)
    saved = parameters(model)
    loaded_equal = None
    if rank == 0:
        model, optimizer = build(None)
        checkpoint.load(first, model=model, optimizer=optimizer, **alone)
        loaded_equal = all(torch.equal(saved[name], value) for name, value in parameters(model).items())
        losses += train(model, optimizer, range(3, 6))
        checkpoint.commit(directory / "one", model=model, optimizer=optimizer, extra={"step": 6}, **alone)
    dist.barrier()
    model, optimizer = build(mesh)
    checkpoint.load(directory / "one" / "step-6", model=model, optimizer=optimizer, **everyone)
    losses += train(model, optimizer, range(6, 9), rank, WORLD_SIZE)
    straight, straight_optimizer = build(None)
    return {
        "losses": losses,
        "straight": train(straight, straight_optimizer, range(9)),
        "loaded_equal": loaded_equal,
        "steps": {float(state["step"]) for state in optimizer.state.values()},
        "parameters": parameters(model),
        "straight_parameters": parameters(straight),
    }


def case_a_refusal_of_one_rank(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    model, optimizer = build(mesh)
    if rank == 1:
        with torch.no_grad():
            fsdp_parameter = next(model.parameters())
            assert isinstance(fsdp_parameter, DTensor)
            fsdp_parameter.to_local()[0, 0] = float("nan")
    text = ""
    try:
        checkpoint.commit(
            directory,
            model=model,
            optimizer=optimizer,
            extra={"step": 1},
            rank=rank,
            world_size=WORLD_SIZE,
            group=dist.group.WORLD,
        )
    except CheckpointError as error:
        text = str(error)
    texts: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(texts, text)
    return {"texts": texts, "left": [path.name for path in directory.glob("*")]}


def case_exchange(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    plain, plain_optimizer = build(mesh)
    turned, optimizer = build(mesh)
    noise = RankNoise(turned, every=1)
    held = [id(parameter) for parameter in turned.parameters()]
    steady = train(plain, plain_optimizer, range(9), rank, WORLD_SIZE)
    losses, rounded = [], []
    for start, dtype in ((0, None), (3, torch.bfloat16), (6, None)):
        noise.exchange_in(dtype)
        losses += train(turned, optimizer, range(start, start + 3), rank, WORLD_SIZE)
        noise.arm(is_elementwise=True)
        x, y = (part.chunk(WORLD_SIZE)[rank] for part in batch_of(start))
        (turned(x) - y).square().mean().backward()
        grads = fsdp.local_grads(turned.parameters())
        rounded.append(all(torch.equal(grad, grad.bfloat16().float()) for grad in grads))
        found = noise.observe(grads, [6, 6], dist.group.WORLD, weights=[torch.ones_like(grad) for grad in grads])
        assert found is not None, "noise is measured whatever gradients are exchanged in"
        optimizer.zero_grad()
    return {
        "steady": steady,
        "turned": losses,
        "rounded": rounded,
        "kept": held == [id(parameter) for parameter in turned.parameters()],
        "dtypes": {str(parameter.dtype) for parameter in turned.parameters()},
    }


def case_a_checkpoint_crosses_tiers(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    everyone: dict[str, Any] = {"rank": rank, "world_size": WORLD_SIZE, "group": dist.group.WORLD}
    result = {}
    for word in ("bf16", "fixed(8,16)"):
        model, optimizer = build(mesh)
        set_tier(model, Tier(word))
        train(model, optimizer, range(3), rank, WORLD_SIZE)
        first = checkpoint.commit(directory / word, model=model, optimizer=optimizer, extra={"step": 3}, **everyone)
        there, other_optimizer = build(mesh)
        checkpoint.load(first, model=there, optimizer=other_optimizer, **everyone)
        second = checkpoint.commit(
            directory / f"{word} again", model=there, optimizer=other_optimizer, extra={"step": 3}, **everyone
        )
        back, back_optimizer = build(mesh)
        set_tier(back, Tier(word))
        checkpoint.load(second, model=back, optimizer=back_optimizer, **everyone)
        saved, middle, last = parameters(model), parameters(there), parameters(back)
        equal = [torch.equal(saved[name], middle[name]) and torch.equal(saved[name], last[name]) for name in saved]
        straight = train(model, optimizer, range(3, 6), rank, WORLD_SIZE)
        gone_on = train(back, back_optimizer, range(3, 6), rank, WORLD_SIZE)
        result[word] = {
            "equal": all(equal),
            "dtypes": {str(value.dtype) for value in saved.values()},
            "straight": straight,
            "gone_on": gone_on,
            "in fp32": train(there, other_optimizer, range(3, 6), rank, WORLD_SIZE),
        }
    return result


def half_gradient(model: nn.Module, parts: list[list[Tensor]], tier: Tier, half: int) -> float:
    set_tier(model, tier)
    x, y = parts[half]
    loss = (model(x) - y).square().mean()
    loss.backward()
    return float(loss.detach())


def case_probe(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    """The same twelve samples probed on one rank and on two: halves of the batch lie on both ranks alike."""
    found: dict[str, Any] = {}
    tiers = [Tier.BF16, Tier("fixed(3,8,floor)")]
    for name, used_mesh, world_size in (("alone", None, 1), ("shared", mesh, WORLD_SIZE)):
        model, _ = build(used_mesh)
        mine = rank if world_size > 1 else 0
        parts = [[part.chunk(2)[half].chunk(world_size)[mine] for part in batch_of(0)] for half in (0, 1)]
        setup = ProbeSetup(
            model=model,
            half_samples=NUM_SAMPLES // 2,
            batch_samples=NUM_SAMPLES,
            group=None if world_size == 1 else dist.group.WORLD,
            device=torch.device("cpu"),
            seed=3,
        )
        probes, times = probe(setup, partial(half_gradient, model, parts), Tier.FP32, tiers, [float(rank)])
        found[name] = [(p.noise_ratio, p.norm_ratio, p.loss_gap) for p in probes.values()]
        found[f"{name} times"] = times
    everyone: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(everyone, found["shared"])
    return {**found, "everyone": everyone}


def case_overflow_in_one_rank(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, Any]:
    """fp16: a loss scale, and an infinity in the gradient of one rank alone."""
    model, optimizer = build(mesh)
    set_tier(model, Tier.FP16)
    scale, norms = LossScale(scale=256.0), []
    for step in range(3):
        x, y = (part.chunk(WORLD_SIZE)[rank] for part in batch_of(step))
        loss = (model(x) - y).square().sum() * WORLD_SIZE / NUM_SAMPLES
        factor = scale.factor(Tier.FP16) * (float("inf") if step == 1 and rank == 1 else 1.0)
        (loss * factor).backward()
        scale.unscale(Tier.FP16, fsdp.local_grads(model.parameters()))
        norm = float(fsdp.clip_and_norm(model.parameters(), 0.5))
        is_skipped = not math.isfinite(norm)
        if not is_skipped:
            optimizer.step()
        optimizer.zero_grad()
        scale.update(Tier.FP16, is_skipped=is_skipped)
        norms.append(norm)
    mine = ([math.isfinite(norm) for norm in norms], scale.scale)
    everyone: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(everyone, mine)
    finite = all(bool(value.isfinite().all()) for value in parameters(model).values())
    return {"everyone": everyone, "finite": finite}


CASES: tuple[Callable[[int, DeviceMesh, Path], dict[str, Any]], ...] = (
    case_one_rank_against_two,
    case_accumulation,
    case_norm_without_clipping,
    case_tier_switch,
    case_a_block_that_is_a_linear_layer,
    case_resume_on_as_many_ranks,
    case_resume_on_other_numbers_of_ranks,
    case_a_refusal_of_one_rank,
    case_exchange,
    case_a_checkpoint_crosses_tiers,
    case_probe,
    case_overflow_in_one_rank,
)


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(directory / "store"), WORLD_SIZE)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    results = {case.__name__: case(rank, mesh, directory / case.__name__) for case in CASES}
    if rank == 0:
        torch.save(results, directory / "results.pt")
    dist.barrier()
    # Not `destroy_process_group` and a normal exit: with gloo, one in some runs aborts while Python shuts down
    # ("terminate called without an active exception"), long after the last case was done.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
