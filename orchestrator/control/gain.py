"""What a change of dials really brought: goodput after it over goodput before it, minus one.

Pure bookkeeping on numbers the controller hands in; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.plan import TrialId

SETTLE_S = 1.5
"""Seconds after an acknowledgement before its gain is taken, so that one slow step weighs little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealisedGain:
    """The measured effect of one allocation on one trial; `realised` is a ratio minus one."""

    trial_id: TrialId
    generation: int
    dials: tuple[str, ...]
    predicted: float | None
    realised: float


@dataclass(slots=True)
class _Measurement:
    generation: int
    dials: tuple[str, ...]
    predicted: float | None
    goodput_before: float
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
        goodput_before: float,
        efficiency_after: float,
    ) -> None:
        """A change was committed; nothing of it is applied yet. `efficiency_after` belongs to the new batch."""
        self._open[trial_id] = _Measurement(generation, dials, predicted, goodput_before, efficiency_after)

    def applied(self, trial_id: TrialId, generation: int, num_samples: int, now_s: float) -> None:
        """The trial runs with the change from here on."""
        measurement = self._open.get(trial_id)
        if measurement is not None and measurement.generation == generation:
            measurement.since_s, measurement.samples_at_start = now_s, num_samples

    def forget(self, trial_id: TrialId) -> None:
        """The trial left its slot."""
        self._open.pop(trial_id, None)

    def settle(self, trial_id: TrialId, num_samples: int, now_s: float) -> RealisedGain | None:
        """The gain of the trial's open change, once enough time has passed; each change is answered once."""
        measurement = self._open.get(trial_id)
        if measurement is None or measurement.since_s is None or now_s - measurement.since_s < SETTLE_S:
            return None
        del self._open[trial_id]
        throughput = (num_samples - measurement.samples_at_start) / (now_s - measurement.since_s)
        if throughput <= 0 or measurement.goodput_before <= 0:
            return None
        return RealisedGain(
            trial_id=trial_id,
            generation=measurement.generation,
            dials=measurement.dials,
            predicted=measurement.predicted,
            realised=throughput * measurement.efficiency_after / measurement.goodput_before - 1.0,
        )
