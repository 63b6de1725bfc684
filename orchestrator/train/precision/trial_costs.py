"""What each tier costs in one trial: declared, read from the calibration file, or measured on its own micro-batch.

Measured tier after tier, dearest first, each beside the fastest that is known by then, in pieces of one round: when the
next piece may be taken is the affair of `watch`, which has the budget. Rank 0 reads and writes the file and its numbers
hold on every rank, so that all ranks judge alike. `calibrate` does the measuring.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train.precision.calibrate import Comparison, CostFile, TierCost, time_replays
from orchestrator.train.precision.probe import undisturbed
from orchestrator.train.step_mode.recorder import CudaRecorder

logger = logging.getLogger(__name__)

_Told = TypeVar("_Told")


class Timed(Protocol):
    """What is timed: the stepper, as far as it matters here."""

    @property
    def model(self) -> torch.nn.Module:
        """Its model."""
        ...

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        ...

    def probe_batch(self, num_samples: int) -> Any:  # noqa: ANN401 - whatever the training's batches are
        """The next samples, this rank's part of them, which are not used up."""
        ...

    def mean_gradient(self, batch: Any, tier: Tier) -> float:  # noqa: ANN401
        """Add the gradient of the mean loss of `batch` over all ranks in `tier`; returns the loss of this rank."""
        ...

    def add_gradient(self, batch: Any, tier: Tier) -> None:  # noqa: ANN401
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
        tiers: those to find, of which the first to be known is the trial's own.

    Attributes:
        known: what is known so far, the same on every rank.
    """

    def __init__(
        self,
        timed: Timed,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        key: str,
        cache: Path | None,
        tiers: Sequence[Tier],
    ) -> None:
        self._timed, self._device, self._group, self._tiers = timed, device, group, tiers
        self._key, self._file = key, None if cache is None else CostFile.of(cache, key)
        self._micro_batch = timed.settings.micro_batch  # which the key names, whatever the trial turns to meanwhile
        self._open: Comparison | None = None
        self.known = self._from_first((None if self._file is None else self._file.load(key, tiers)) or {})

    @property
    def next_tier(self) -> Tier | None:
        """The tier to be measured next, or now; None where all are known, or there is nothing to compare."""
        if len(self._tiers) < 2:
            return None
        return next((tier for tier in self._tiers if tier not in self.known and tier is not self._base), None)

    @property
    def ratio(self) -> float:
        """Seconds of the tier being measured over those of the fastest known so far; 1 before its first round."""
        return 1.0 if self._open is None else self._open.ratio

    def measure_all(self) -> None:
        """Everything at once, with the time of a replay where steps are replayed, unless all is known."""
        if self.next_tier is None:
            return
        self.known = {}  # times of replays, beside which eager ones say nothing
        while self.next_tier is not None:
            self._take_round(self.next_tier)
        self.known = self._from_first(self._replayed(self.known))
        self._keep()

    def take_piece(self) -> None:
        """One round of the next tier, on every rank; keeps what it costs once that is clear."""
        assert self.next_tier is not None, "asked for while something is not known"
        if self._take_round(self.next_tier):
            self._keep()

    def _take_round(self, tier: Tier) -> bool:
        """Whether the cost of `tier` is known now."""
        timed = self._timed
        batch = timed.probe_batch(self._micro_batch)

        def run(tier: Tier) -> None:
            timed.mean_gradient(batch, tier)
            timed.model.zero_grad()

        comparison = self._open = self._open or Comparison(self._base, tier, self._device)
        with undisturbed(timed.model, self._device):
            comparison.note(*self._from_first(comparison.take_round(run)))
        if not comparison.is_over:
            return False
        self._open = None
        self.known = {**self.known, **self._from_first(comparison.costs(self.known.get(comparison.base)))}
        shown = ", ".join(f"{tier} {self.known[tier].step_s * 1e3:.1f} ms" for tier in (comparison.base, tier))
        logger.info("calibrated %s per micro-batch of %d", shown, self._micro_batch)
        return True

    @property
    def _base(self) -> Tier:
        """The fastest tier known; the trial's own where none is."""
        if self._open is not None:
            return self._open.base
        if not self.known:
            own = self._timed.settings.tier
            return own if own in self._tiers else self._tiers[0]
        return min(self.known, key=lambda tier: self.known[tier].step_s)

    def _keep(self) -> None:
        if self._file is not None and (self._group is None or dist.get_rank(self._group) == 0):
            self._file.store(self._key, self.known)

    def _replayed(self, costs: dict[Tier, TierCost]) -> dict[Tier, TierCost]:
        """On one GPU, where steps are replayed from graphs: the time of a replay, which launches cannot hide.

        A tier that cannot be recorded keeps its eager time; fp16 is never replayed.
        """
        if self._device.type != "cuda" or self._group is not None or not self._timed.may_replay:
            return costs
        recorder = CudaRecorder()
        replays: dict[Tier, Callable[[], None]] = {}
        batch = self._timed.probe_batch(self._micro_batch)
        with undisturbed(self._timed.model, self._device):
            for tier in costs:
                if tier is Tier.FP16:
                    continue
                work = partial(self._timed.add_gradient, batch, tier)
                try:
                    recorder.rehearse(work)
                    self._timed.model.zero_grad()  # so that the recording has its own and needs nobody to keep them
                    replays[tier] = recorder.record(work)
                except Exception as error:  # whatever a model does that a graph cannot hold
                    logger.info("calibration of %s without a graph: %s", tier, str(error).partition("\n")[0])
                finally:
                    self._timed.model.zero_grad()
            seconds = time_replays(replays)
        return {
            tier: replace(cost, step_s=min(seconds.get(tier, cost.step_s), cost.step_s)) for tier, cost in costs.items()
        }

    def _from_first(self, value: _Told) -> _Told:
        """The first rank's value, on every rank."""
        told = [value]
        if self._group is not None:
            dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]
