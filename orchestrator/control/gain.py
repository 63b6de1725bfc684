"""What a change of dials really brought: goodput after it over goodput before it, minus one.

Pure bookkeeping on numbers the controller hands in; it decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from policies.plan import TrialId

SETTLE_S = 1.5
"""Seconds of training over which a gain is taken, so that one slow step weighs little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a trial goes: samples/s, what a sample is worth relative to the start batch, and their product."""

    throughput: float
    efficiency: float

    @property
    def goodput(self) -> float:
        """Samples/s of useful progress."""
        return self.throughput * self.efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class RealisedGain:
    """The measured effect of one allocation on one trial; `realised` is a ratio minus one, of `after` to `before`."""

    trial_id: TrialId
    generation: int
    dials: tuple[str, ...]
    predicted: float | None
    realised: float
    before: Pace
    after: Pace


@dataclass(slots=True)
class _Measurement:
    generation: int
    dials: tuple[str, ...]
    predicted: float | None
    before: Pace
    efficiency_after: float
    since_s: float | None = None
    samples_at_start: int = 0


class GainMeter:
    """Measures at most one change per trial at a time; a newer change of the same trial replaces the older one."""

    def __init__(self) -> None:
        self._open: dict[TrialId, _Measurement] = {}

    def committed(
        self,
        trial_id: TrialId,
        generation: int,
        dials: tuple[str, ...],
        predicted: float | None,
        before: Pace,
        efficiency_after: float,
    ) -> None:
        """A change was committed; nothing of it is applied yet. `efficiency_after` belongs to the new batch."""
        self._open[trial_id] = _Measurement(generation, dials, predicted, before, efficiency_after)

    def forget(self, trial_id: TrialId) -> None:
        """The trial left its slot."""
        self._open.pop(trial_id, None)

    def settle(self, trial_id: TrialId, generation: int, num_samples: int, updated_s: float) -> RealisedGain | None:
        """The gain of the trial's open change, once it has trained with it for a while; each is answered once.

        Args:
            trial_id: the trial.
            generation: of the allocation its newest step ran under.
            num_samples: samples consumed up to that step.
            updated_s: when that step ended, by the trial's own records: what is under way does not count.
        """
        measurement = self._open.get(trial_id)
        if measurement is None or generation != measurement.generation:
            return None
        if measurement.since_s is None:
            measurement.since_s, measurement.samples_at_start = updated_s, num_samples
        if updated_s - measurement.since_s < SETTLE_S:
            return None
        del self._open[trial_id]
        throughput = (num_samples - measurement.samples_at_start) / (updated_s - measurement.since_s)
        if throughput <= 0 or measurement.before.goodput <= 0:
            return None
        after = Pace(throughput=throughput, efficiency=measurement.efficiency_after)
        return RealisedGain(
            trial_id=trial_id,
            generation=measurement.generation,
            dials=measurement.dials,
            predicted=measurement.predicted,
            realised=after.goodput / measurement.before.goodput - 1.0,
            before=measurement.before,
            after=after,
        )


class GainMean:
    """The typical gain of a dial: the geometric mean over its changes, because gains multiply."""

    def __init__(self) -> None:
        self._log_sum, self._count = 0.0, 0

    def add(self, realised: float) -> None:
        """Take in the gain of one change, > -1."""
        self._log_sum += math.log1p(realised)
        self._count += 1

    @property
    def per_change(self) -> float:
        """Gain of one change, a ratio minus one."""
        return math.expm1(self._log_sum / self._count) if self._count else 0.0
