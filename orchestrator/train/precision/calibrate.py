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
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.hardware import cpu_facts
from orchestrator.policies.tier import NAMED_TIERS, Tier

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
MIN_ROUNDS, NUM_ROUNDS = 2, 5
"""Rounds that find a tier faster, and rounds after which it is as fast as it looks; the least time counts."""
MUCH_SLOWER, SLOWER, FASTER = 1.5, 1.1, 0.9
"""Of the known tier's seconds: clearly slower where even the fastest pass is above, clearly faster below; the first is
for the first round."""
MIN_REPLAY_ROUNDS, REPLAY_ROUNDS, REPLAYS = 3, 7, 4
"""Rounds in which replays of all tiers are timed in turn, and replays in a row in each."""
ENOUGH_REPLAY_S = 0.4
"""Seconds of them after which the least number of rounds is enough."""
_WORTH_S = 0.05
"""Seconds of passes from which on it is worth while to save some; shorter ones are noisier, too."""


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


class Comparison:
    """Times of one tier beside one that is known, in turn, so that what else the machine does meets both alike.

    It is over as soon as the tier is clearly slower or clearly faster, and after `NUM_ROUNDS` in any case.

    Args:
        base: the fastest tier known so far.
        tier: the one in question.
        device: they run on.
    """

    def __init__(self, base: Tier, tier: Tier, device: torch.device) -> None:
        self.base, self.tier, self._device = base, tier, device
        self._times: dict[Tier, list[float]] = {base: [], tier: []}
        self._memory: dict[Tier, float] = {}

    def take_round(self, run: Callable[[Tier], None]) -> tuple[float, float]:
        """`run`, a forward and backward pass, once in each; returns their seconds, those of the base first.

        The first round also finds what memory they take, and on a GPU warms them up before.
        """
        is_first = not self._memory
        seconds = []
        for tier in (self.base, self.tier):
            began_s = time.perf_counter()
            if is_first:
                self._memory[tier] = _memory_of(run, tier, self._device)
            else:
                run(tier)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - began_s)
        return seconds[0], seconds[1]

    def note(self, base_s: float, tier_s: float) -> None:
        """Take in a round: what `take_round` returned on the rank whose numbers hold."""
        self._times[self.base].append(base_s)
        self._times[self.tier].append(tier_s)

    @property
    def ratio(self) -> float:
        """Seconds of the tier over those of the base, the least of each; 1 before the first round."""
        base, tier = self._times[self.base], self._times[self.tier]
        return min(tier) / min(base) if base else 1.0

    @property
    def is_over(self) -> bool:
        """Whether more rounds would tell nothing that matters."""
        base, tier = self._times[self.base], self._times[self.tier]
        if sum(tier) < _WORTH_S or len(tier) >= NUM_ROUNDS:
            return len(tier) >= NUM_ROUNDS
        if len(tier) < MIN_ROUNDS:  # a first pass may be slow for once, but on a CPU not a long one by half
            return self._device.type == "cpu" and tier[0] > MUCH_SLOWER * base[0]
        return min(tier) > SLOWER * statistics.median(base) or max(tier[1:]) < FASTER * min(base)

    def costs(self, base: TierCost | None = None) -> dict[Tier, TierCost]:
        """What both take; where `base` is known from before its seconds stand, as they may be of a calmer hour."""
        base = base or TierCost(step_s=min(self._times[self.base]), memory_bytes=self._memory[self.base])
        tier = TierCost(step_s=base.step_s * self.ratio, memory_bytes=self._memory[self.tier])
        return {self.base: base, self.tier: tier}


def time_replays(replays: Mapping[Tier, Callable[[], None]]) -> dict[Tier, float]:
    """Seconds of one replay of what was recorded on this GPU in each tier.

    In turn and a few at a time, so that other trials on the card meet all tiers alike: the first tier by its least
    time, the others by how they compare with it in the same round, typically.
    """
    seconds: dict[Tier, list[float]] = {tier: [] for tier in replays}
    first_began_s = time.perf_counter()
    for number in range(REPLAY_ROUNDS):
        if number >= MIN_REPLAY_ROUNDS and time.perf_counter() - first_began_s > ENOUGH_REPLAY_S:
            break
        for tier, replay in replays.items():
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            for _ in range(REPLAYS):
                replay()
            torch.cuda.synchronize()
            seconds[tier].append((time.perf_counter() - began_s) / REPLAYS)
    return _beside_the_first(seconds)


def _beside_the_first(seconds: Mapping[Tier, Sequence[float]]) -> dict[Tier, float]:
    """The least time of the first tier, and that times the typical ratio of each other in the same rounds.

    >>> list(_beside_the_first({Tier.TF32: [4.0, 2.0, 6.0], Tier.BF16: [2.0, 1.0, 5.0]}).values())
    [2.0, 1.0]
    """
    first = next(iter(seconds.values()), ())
    return {
        tier: min(first) * statistics.median(own / base for own, base in zip(each, first, strict=True))
        for tier, each in seconds.items()
    }


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
        """What was measured under `key` of `tiers`, which need not be all of them; None where nothing was."""
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
        return {tier: costs[tier] for tier in tiers if tier in costs} or None

    def store(self, key: str, costs: dict[Tier, TierCost]) -> None:
        """Write whole or not at all; a directory that cannot be written costs the next trial a measurement, no more.

        What another trial of the shape has written of other tiers stays.
        """
        costs = {**(self.load(key, NAMED_TIERS) or {}), **costs}
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
