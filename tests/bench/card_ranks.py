"""Plain processes that train one model as the ranks of a trial do, without Ray: for what several GPUs themselves give.

Each rank is a `Stepper` on a GPU of its own, over NCCL (on cores over gloo). `is_wrapped` shards a single rank too,
over a mesh of size 1, so that one and two GPUs can be compared in the same step mode.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from orchestrator.control.orders import TrialOrder
    from orchestrator.train.groups import Ranks

WARM_STEPS = 5
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What every rank does.

    Attributes:
        directory: where they meet, and leave what they measured.
        params: of the job `language`.
        micro_batch: samples per rank and step.
        tier: word of the precision tier.
        world_size: ranks.
        num_steps: measured steps, after the first few.
        is_wrapped: shard even over one rank.
        device: cuda or cpu.
        lanes: SM groups to change to, one after the other, in equal parts of the steps; empty for none.
        gives_back_every: after so many steps the allocator gives what it does not need back to the GPU; 0 for never.
        holds_parameters: keep the whole parameters from the forward to the backward pass instead of gathering twice.
        profiled_steps: steps behind the measured ones that are profiled.
        tell_at_s: on the monotonic clock, when ranks that are not through say where they are; None for never.
    """

    directory: Path
    params: dict[str, Any]
    micro_batch: int
    tier: str
    world_size: int
    num_steps: int
    is_wrapped: bool = False
    device: str = "cuda"
    lanes: tuple[tuple[int, ...], ...] = ()
    gives_back_every: int = 0
    holds_parameters: bool = False
    profiled_steps: int = 0
    tell_at_s: float | None = None


def train(plan: RankPlan) -> list[dict[str, Any]]:
    """Run the ranks; what each of them measured.

    Raises:
        Exception: a rank raised; the others were ended.
    """
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory(dir=plan.directory) as directory:
        here = replace(plan, directory=Path(directory))
        spawn(_rank, args=(here,), nprocs=plan.world_size)  # type: ignore[no-untyped-call]
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(plan.world_size)]


def tell_where(at_s: float | None) -> None:
    """Write the stacks of all threads to stderr at that time of the monotonic clock, if this process still runs."""
    if at_s is not None:
        faulthandler.dump_traceback_later(max(0.1, at_s - time.monotonic()), exit=False)


def _see_own_card_first(rank: int, world_size: int) -> None:
    """As `devices.ray_cards` does for the ranks of a slot: before CUDA is touched, and the own card is cuda:0."""
    from orchestrator.devices.cards import Seat, visible

    named = os.environ.get(VISIBLE)
    cards = tuple(named.split(",")) if named else tuple(str(number) for number in range(world_size))
    seats = [Seat(node_id="", assigned=cards[number], cards=cards) for number in range(world_size)]
    os.environ[VISIBLE] = visible(seats)[rank]


def _rank(rank: int, plan: RankPlan) -> None:
    tell_where(plan.tell_at_s)
    if plan.device == "cuda":
        _see_own_card_first(rank, plan.world_size)
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from orchestrator.jobs import build_job
    from orchestrator.train.stepper import Stepper

    device = torch.device("cuda", 0) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=FileStore(str(plan.directory / "store"), plan.world_size),
        rank=rank,
        world_size=plan.world_size,
        timeout=timedelta(seconds=60),
    )
    if plan.holds_parameters:
        from orchestrator.train import fsdp

        fsdp.fully_shard = partial(fsdp.fully_shard, reshard_after_forward=False)  # type: ignore[assignment,attr-defined]
    ranks = _ranks_of(rank, plan, device)
    job = build_job("language", {**plan.params, "eval_windows": 16})
    job.prepare()
    torch.manual_seed(1)
    stepper = Stepper(_order(plan), job, ranks)
    found = _measure(stepper, plan, device)
    if plan.profiled_steps:
        found["profile"] = _profile(stepper, plan.profiled_steps)
    found["card"] = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    found["num_parameters"] = sum(param.numel() for param in stepper.model.parameters())
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    (plan.directory / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def _ranks_of(rank: int, plan: RankPlan, device: torch.device) -> Ranks:
    """Where this process stands; the groups are those of a slot."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from orchestrator.train import fsdp
    from orchestrator.train.groups import Groups, Ranks
    from orchestrator.train.step_mode.choice import StepMode

    if plan.world_size > 1:
        return Groups(rank, plan.world_size, device, StepMode.EAGER).ranks
    if plan.is_wrapped:
        mesh = DeviceMesh.from_group(dist.new_group(), device.type)

        def wrapped(model: nn.Module, blocks: Sequence[nn.Module], _mesh: DeviceMesh | None) -> int:
            return fsdp.shard_over(model, blocks, mesh)

        fsdp.shard = wrapped  # type: ignore[assignment]  # a trial of one rank is never sharded
    return Ranks(rank=0, world_size=1, device=device, step_mode=StepMode.EAGER)


def _order(plan: RankPlan) -> TrialOrder:
    from orchestrator.policies.tier import Tier
    from tests.unit.orchestrator.train.links import order

    trial = order(plan.directory, num_ranks=plan.world_size, samples_per_report=10**9).trial
    assert trial is not None
    start = replace(trial.start, micro_batch=plan.micro_batch, tier=Tier(plan.tier))
    return replace(trial, job="language", params=plan.params, start=start, max_reports=1)


def _measure(stepper: Any, plan: RankPlan, device: torch.device) -> dict[str, Any]:
    """Train; losses and seconds of all steps."""
    import torch

    from orchestrator.share.sm_groups import SmGroups

    share = SmGroups() if plan.lanes else None
    total, losses, seconds = WARM_STEPS + plan.num_steps, [], []
    for step in range(total):
        if share is not None:
            lane = plan.lanes[step * len(plan.lanes) // total]
            share.apply(lane, float(len(lane)))
        if plan.gives_back_every and step % plan.gives_back_every == 0:
            torch.cuda.empty_cache()
        began_s = time.perf_counter()
        losses += [result.loss for result in stepper.advance()]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    if share is not None:
        share.release()
    measured = seconds[WARM_STEPS:]
    return {
        "losses": losses,
        "step_s": measured,
        "median_step_s": statistics.median(measured),
        "mean_step_s": statistics.fmean(measured),
        "num_units": None if share is None else share.num_units,
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("NCCL", "CUDA_"))},
    }


def _profile(stepper: Any, num_steps: int) -> dict[str, float]:
    """Milliseconds per step in which the GPU exchanges, computes, does both, and neither, by the profiler's trace."""
    from tests.bench.gpu_job import spans_of

    spans = spans_of(lambda: [stepper.advance() for _ in range(num_steps)])
    return {name: value / num_steps for name, value in busy_ms(spans).items()}


def busy_ms(spans: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """How long kernels of NCCL and others ran, from (name, begin, end) in milliseconds; overlaps count once.

    >>> busy_ms([("ncclDevKernel_AllGather", 0.0, 4.0), ("gemm", 1.0, 3.0), ("gemm", 2.0, 5.0), ("copy", 7.0, 8.0)])
    {'whole': 8.0, 'exchange': 4.0, 'others': 5.0, 'exchange alone': 1.0, 'nothing': 2.0}
    """
    if not spans:
        return {}
    exchange = _union([(low, high) for name, low, high in spans if name.startswith("nccl")])
    others = _union([(low, high) for name, low, high in spans if not name.startswith("nccl")])
    either = _length(_union([*exchange, *others]))
    whole = max(high for _, _, high in spans) - min(low for _, low, _ in spans)
    return {
        "whole": whole,
        "exchange": _length(exchange),
        "others": _length(others),
        "exchange alone": either - _length(others),
        "nothing": whole - either,
    }


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time, in intervals that do not overlap."""
    found: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(high - low for low, high in spans)
