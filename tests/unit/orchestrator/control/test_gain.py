"""Realised gains: measured on the trial's own records, once per change, never mixed between changes."""

from __future__ import annotations

import pytest

from orchestrator.control.gain import LEAST_S, SETTLE_S, GainMean, Measurement, Pace, settled
from orchestrator.policies.plan import TrialId
from orchestrator.telemetry.stretch import Stretch

T = TrialId("t")


def pace(goodput: float) -> Pace:
    return Pace(throughput=2.0 * goodput, efficiency=0.5)


def committed(goodput_before: float = 100.0, efficiency_after: float = 1.0) -> Measurement:
    return Measurement(
        generation=2, dials=("share",), predicted=0.4, before=pace(goodput_before), efficiency_after=efficiency_after
    )


def stretch(samples_per_s: float, seconds: float, generation: int = 2, num_steps: int = 50) -> Stretch:
    return Stretch(generation=generation, num_steps=num_steps, seconds=seconds, samples_per_s=samples_per_s)


def test_the_gain_is_goodput_after_over_before() -> None:
    change = committed(efficiency_after=0.5)
    assert settled(T, change, None) is None, "no step yet"
    assert settled(T, change, stretch(300.0, SETTLE_S / 2)) is None, "too few seconds"
    gain = settled(T, change, stretch(300.0, SETTLE_S))
    assert gain is not None
    assert gain.realised == pytest.approx(300.0 * 0.5 / 100.0 - 1.0)
    assert (gain.generation, gain.dials, gain.predicted) == (2, ("share",), 0.4)
    assert (gain.before, gain.after) == (pace(100.0), Pace(throughput=300.0, efficiency=0.5))


def test_steps_of_an_earlier_generation_do_not_count() -> None:
    change = committed()
    assert settled(T, change, stretch(50.0, 60.0, generation=1)) is None
    gain = settled(T, change, stretch(100.0, SETTLE_S))
    assert gain is not None
    assert gain.realised == pytest.approx(0.0)


def test_a_few_long_steps_are_no_measurement() -> None:
    assert settled(T, committed(), stretch(100.0, 60.0, num_steps=2)) is None


def test_where_the_next_change_comes_less_is_enough() -> None:
    change = committed()
    assert settled(T, change, stretch(100.0, LEAST_S)) is None
    assert settled(T, change, stretch(100.0, LEAST_S / 2), is_last=True) is None
    assert settled(T, change, stretch(100.0, LEAST_S), is_last=True) is not None


def test_nothing_is_settled_where_no_change_is_measured_or_nothing_was_done_before() -> None:
    assert settled(T, None, stretch(100.0, 60.0)) is None
    assert settled(T, committed(goodput_before=0.0), stretch(100.0, 60.0)) is None


def test_the_typical_gain_is_a_geometric_mean() -> None:
    mean = GainMean()
    mean.add(1.0)
    mean.add(-0.5)
    assert mean.per_change == pytest.approx(0.0)
