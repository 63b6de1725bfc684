"""How long a micro-batch takes and how much memory it keeps in each tier, measured here and remembered on disk.

Nothing is assumed: bf16 is slower than tf32 for small models on a large GPU, and slower than fp32 on a processor
without its instructions. A measurement is kept under the model's shape, the device, the micro-batch and the step mode,
so that only the first trial of a shape pays. Knows neither trials nor ranks; called by `watch`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.hardware import cpu_facts
from orchestrator.train.step_mode.recorder import Recorder
from policies.tier import Tier

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
NUM_ROUNDS = 5
"""Timed runs of each tier, in turn, so that what else the machine does meets all tiers alike; the least time counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCost:
    """What a forward and backward pass of one micro-batch takes.

    Attributes:
        step_s: seconds.
        memory_bytes: peak device memory, or bytes kept for the backward pass on a CPU.
    """

    step_s: float
    memory_bytes: float


def calibration_key(
    job: str, speed_params: Sequence[str], micro_batch: int, world_size: int, device: torch.device, mode: str = "eager"
) -> str:
    """Everything that fixes what a micro-batch costs, in words: model shape, device, step mode, version of torch."""
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {torch.get_num_threads()}"
    )
    parts = [job, *sorted(speed_params), f"micro={micro_batch}", f"ranks={world_size}", where, mode, torch.__version__]
    return "; ".join(parts)


def _processor() -> str:
    return ",".join([platform.machine(), *sorted(cpu_facts().cpu_flags)])


def measure(
    run: Callable[[Tier], None], tiers: Sequence[Tier], device: torch.device, budget_s: float
) -> dict[Tier, TierCost]:
    """Time `run` (a forward and backward pass) in each of `tiers`; after the first round within about `budget_s`."""
    memory = {tier: _memory_of(run, tier, device) for tier in tiers}  # also warms up
    times: dict[Tier, list[float]] = {tier: [] for tier in tiers}
    began_s = time.perf_counter()
    for _ in range(NUM_ROUNDS):
        for tier in tiers:
            times[tier].append(_time_of(run, tier, device))
        if time.perf_counter() - began_s > budget_s:
            break
    return {tier: TierCost(step_s=min(times[tier]), memory_bytes=memory[tier]) for tier in tiers}


def time_replay(recorder: Recorder, work: Callable[[], None]) -> float:
    """Seconds of one replay of `work` on this GPU, the least of a few batches of ten."""
    recorder.rehearse(work)
    replay = recorder.record(work)
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(10):
            replay()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began_s) / 10)
    return min(seconds)


def _time_of(run: Callable[[Tier], None], tier: Tier, device: torch.device) -> float:
    began_s = time.perf_counter()
    run(tier)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began_s


def _memory_of(run: Callable[[Tier], None], tier: Tier, device: torch.device) -> float:
    if device.type == "cuda":
        run(tier)
        torch.cuda.reset_peak_memory_stats(device)
        run(tier)
        return float(torch.cuda.max_memory_allocated(device))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(tier)
    return float(sum(kept.values()))


@dataclass(frozen=True, slots=True)
class CostFile:
    """The file of one key. Unreadable files are as good as none: what is in them can be measured again."""

    path: Path

    @classmethod
    def of(cls, directory: Path, key: str) -> CostFile:
        """The file of `key` in `directory`; the name tells keys apart, the content says what they are."""
        return cls(directory / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json")

    def load(self, key: str, tiers: Sequence[Tier]) -> dict[Tier, TierCost] | None:
        """What was measured under `key`, if it covers all `tiers`."""
        try:
            content = json.loads(self.path.read_text())
            if (content["schema"], content["key"]) != (SCHEMA_VERSION, key):
                return None
            costs = {
                Tier(word): TierCost(step_s=float(cost["step_s"]), memory_bytes=float(cost["memory_bytes"]))
                for word, cost in content["costs"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return {tier: costs[tier] for tier in tiers} if set(tiers) <= set(costs) else None

    def store(self, key: str, costs: dict[Tier, TierCost]) -> None:
        """Write whole or not at all; a directory that cannot be written costs the next trial a measurement, no more."""
        content = {
            "schema": SCHEMA_VERSION,
            "key": key,
            "costs": {tier.value: asdict(cost) for tier, cost in costs.items()},
        }
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content, indent=1, sort_keys=True))
            unfinished.replace(self.path)
        except OSError as error:
            logger.warning("calibration was not kept in %s: %s", self.path, error)
