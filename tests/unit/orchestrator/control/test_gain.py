"""Realised gains: measured on the trial's own records, once per change, never mixed between changes."""

from __future__ import annotations

import pytest

from orchestrator.control.gain import GainMean, GainMeter, Pace
from policies.plan import TrialId

T = TrialId("t")


def pace(goodput: float) -> Pace:
    return Pace(throughput=2.0 * goodput, efficiency=0.5)


def committed(goodput_before: float = 100.0, efficiency_after: float = 1.0) -> GainMeter:
    meter = GainMeter()
    meter.committed(T, 2, ("share",), 0.4, pace(goodput_before), efficiency_after)
    return meter


def test_the_gain_is_goodput_after_over_before() -> None:
    meter = committed(efficiency_after=0.5)
    assert meter.settle(T, 2, 1000, 10.0) is None, "the first look only starts the clock"
    gain = meter.settle(T, 2, 1900, 13.0)
    assert gain is not None
    assert gain.realised == pytest.approx(300.0 * 0.5 / 100.0 - 1.0)
    assert (gain.generation, gain.dials, gain.predicted) == (2, ("share",), 0.4)
    assert (gain.before, gain.after) == (pace(100.0), Pace(throughput=300.0, efficiency=0.5))
    assert meter.settle(T, 2, 3000, 20.0) is None, "each change is answered once"


def test_steps_of_an_earlier_generation_do_not_count() -> None:
    meter = committed()
    assert meter.settle(T, 1, 1000, 10.0) is None
    assert meter.settle(T, 1, 2000, 20.0) is None
    assert meter.settle(T, 2, 2000, 21.0) is None
    gain = meter.settle(T, 2, 2300, 24.0)
    assert gain is not None
    assert gain.realised == pytest.approx(0.0)


def test_a_newer_change_replaces_an_older_one_and_an_ended_trial_is_forgotten() -> None:
    meter = committed()
    meter.settle(T, 2, 0, 0.0)
    meter.committed(T, 3, ("batch",), None, pace(50.0), 1.0)
    assert meter.settle(T, 2, 1000, 10.0) is None
    meter.forget(T)
    assert meter.settle(T, 3, 1000, 10.0) is None


def test_the_typical_gain_is_a_geometric_mean() -> None:
    mean = GainMean()
    mean.add(1.0)
    mean.add(-0.5)
    assert mean.per_change == pytest.approx(0.0)
