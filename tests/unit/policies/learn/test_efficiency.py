from __future__ import annotations

import doctest
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.learn.efficiency import efficiency, gain, goodput

BATCH = st.integers(1, 2**20)
NOISE = st.floats(1.0, 2.0**20)


@pytest.mark.parametrize(
    "name",
    [
        "policies",
        "orchestrator.policies.learn.efficiency",
        "orchestrator.policies.learn.tier_fit",
        "orchestrator.policies.decide.shares",
        "orchestrator.policies.learn.speed",
        "orchestrator.policies.tier",
    ],
)
def test_the_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@given(NOISE, BATCH, BATCH)
def test_efficiency_falls_with_the_batch_and_is_one_at_the_base(noise: float, base: int, batch: int) -> None:
    assert efficiency(noise, base, base) == 1.0
    assert (efficiency(noise, base, batch) < 1) == (batch > base)
    assert efficiency(noise, base, 2 * batch) < efficiency(noise, base, batch)


@given(NOISE, BATCH, st.integers(1, 64))
def test_gain_lies_between_one_and_the_scale_and_matches_efficiency(noise: float, base: int, scale: int) -> None:
    value = gain(noise, base, scale * base)
    assert 1 - 1e-9 <= value <= scale + 1e-9
    assert value == pytest.approx(scale * efficiency(noise, base, scale * base))


def test_unknown_noise_promises_nothing() -> None:
    assert goodput(200.0, None, 8, 16) == pytest.approx(goodput(100.0, None, 8, 8))
    assert efficiency(None, 8, 4) == 1.0


def test_a_batch_of_zero_is_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="global_batch=0"):
        efficiency(10.0, 8, 0)
