"""What each tier costs in one trial: declared, read from the calibration file, or measured on its own micro-batch.

Rank 0 reads and writes the file and its numbers hold on every rank, so that all ranks judge alike. Called by `watch`
before the first step; `calibrate` does the measuring.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from orchestrator.train.precision.calibrate import CostFile, TierCost, measure, time_replay
from orchestrator.train.precision.probe import undisturbed
from orchestrator.train.step_mode.recorder import CudaRecorder
from policies.plan import Settings
from policies.tier import Tier

logger = logging.getLogger(__name__)

_CALIBRATION_S = 2.0


class Timed(Protocol):
    """What is timed: the stepper, as far as it matters here."""

    model: torch.nn.Module
    settings: Settings

    def probe_batch(self, num_samples: int) -> tuple[torch.Tensor, ...]:
        """The next samples, this rank's part of them, which are not used up."""
        ...

    def mean_gradient(self, batch: tuple[torch.Tensor, ...], tier: Tier) -> float:
        """Add the gradient of the mean loss of `batch` over all ranks in `tier`; returns the loss of this rank."""
        ...

    def add_gradient(self, batch: tuple[torch.Tensor, ...], tier: Tier) -> None:
        """Do what `mean_gradient` does without reading anything back, as a recorded step does."""
        ...

    @property
    def may_replay(self) -> bool:
        """Whether its steps may be replayed from a graph."""
        ...


class TrialCosts:
    """Finds the costs of one trial's tiers.

    Args:
        timed: the trial.
        device: it runs on.
        group: of all ranks for small messages, None for one rank.
        key: what fixes the costs, for the file.
        cache: directory of calibration files, None to measure always.
    """

    def __init__(
        self, timed: Timed, device: torch.device, group: dist.ProcessGroup | None, key: str, cache: Path | None
    ) -> None:
        self._timed, self._device, self._group = timed, device, group
        self._key, self._file = key, None if cache is None else CostFile.of(cache, key)

    def find(self, tiers: Sequence[Tier]) -> dict[Tier, TierCost]:
        """What a micro-batch costs in each of `tiers`, the same on every rank."""
        known = self._from_first(None if self._file is None else self._file.load(self._key, tiers))
        return known or self._measured(tiers)

    def _measured(self, tiers: Sequence[Tier]) -> dict[Tier, TierCost]:
        timed = self._timed
        batch = timed.probe_batch(timed.settings.micro_batch)

        def run(tier: Tier) -> None:
            timed.mean_gradient(batch, tier)
            for param in timed.model.parameters():
                param.grad = None

        with undisturbed(timed.model, self._device):
            costs = measure(run, tiers, self._device, _CALIBRATION_S)
            costs = self._replayed(costs, batch)
        if self._file is not None and (self._group is None or dist.get_rank(self._group) == 0):
            self._file.store(self._key, costs)
        found = self._from_first(costs)
        assert found is not None
        shown = ", ".join(f"{tier} {cost.step_s * 1e3:.1f} ms" for tier, cost in found.items())
        logger.info("calibrated %s per micro-batch of %d", shown, timed.settings.micro_batch)
        return found

    def _replayed(self, costs: dict[Tier, TierCost], batch: tuple[torch.Tensor, ...]) -> dict[Tier, TierCost]:
        """On one GPU, where steps are replayed from graphs: the time of a replay, which launches cannot hide.

        A tier that cannot be recorded keeps its eager time; fp16 is never replayed.
        """
        if self._device.type != "cuda" or self._group is not None or not self._timed.may_replay:
            return costs
        recorder = CudaRecorder()
        found = dict(costs)
        for tier, cost in costs.items():
            if tier is Tier.FP16:
                continue
            try:
                seconds = time_replay(recorder, partial(self._timed.add_gradient, batch, tier))
            except Exception as error:  # whatever a model does that a graph cannot hold
                logger.info("calibration of %s without a graph: %s", tier, str(error).partition("\n")[0])
                continue
            finally:
                for param in self._timed.model.parameters():
                    param.grad = None
            found[tier] = replace(cost, step_s=min(seconds, cost.step_s))
        return found

    def _from_first(self, value: dict[Tier, TierCost] | None) -> dict[Tier, TierCost] | None:
        """The first rank's value, on every rank."""
        told = [value]
        if self._group is not None:
            dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]
