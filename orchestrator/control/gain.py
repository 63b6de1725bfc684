"""What a change of dials really brought: goodput after it over goodput before it, minus one.

Both sides are steps of the trial's own records, each under one setting of its dials. Pure bookkeeping on numbers the
controller hands in; it decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.policies.learn.efficiency import efficiency
from orchestrator.policies.learn.fit import TrialFit, noise_scale
from orchestrator.policies.plan import TrialId
from orchestrator.telemetry.stretch import Stretch

SETTLE_S = 1.5
"""Seconds of training over which a gain is taken, so that one slow step weighs little."""
LEAST_S = 0.5
"""Seconds that are enough where the next change ends the measurement."""
MIN_STEPS = 5


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A change that was committed and whose effect is not known yet; `efficiency_after` belongs to the new batch."""

    generation: int
    dials: tuple[str, ...]
    predicted: float | None
    before: Pace
    efficiency_after: float


def efficiency_of(fit: TrialFit, base_batch: int, global_batch: int) -> float:
    """Statistical efficiency of a batch as far as the noise scale is known, else 1: only throughput is compared."""
    noise = noise_scale(fit)
    return 1.0 if noise is None else efficiency(noise, base_batch, global_batch)


def settled(
    trial_id: TrialId, measurement: Measurement | None, now: Stretch | None, *, is_last: bool = False
) -> RealisedGain | None:
    """The gain of a change, once the trial has trained with it for a while; None until then.

    Args:
        trial_id: the trial.
        measurement: the change that is being measured, if any.
        now: how fast the trial went since its dials last turned.
        is_last: whether it is about to change again, so that less has to be enough.
    """
    if measurement is None or now is None or now.generation != measurement.generation:
        return None
    if now.num_steps < MIN_STEPS or now.seconds < (LEAST_S if is_last else SETTLE_S):
        return None
    if measurement.before.goodput <= 0:
        return None
    after = Pace(throughput=now.samples_per_s, efficiency=measurement.efficiency_after)
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
