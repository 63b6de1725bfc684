"""When a comparison of two tiers is over, in what order tiers are measured, and what that may cost. No clock."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import torch

from orchestrator.policies.tier import Tier
from orchestrator.train.precision import trial_costs
from orchestrator.train.precision.calibrate import (
    MIN_REPLAY_ROUNDS,
    NUM_ROUNDS,
    REPLAY_ROUNDS,
    REPLAYS,
    Comparison,
    TierCost,
    time_replays,
)
from orchestrator.train.precision.guard import Guard, Probe
from orchestrator.train.precision.spending import Spending
from orchestrator.train.precision.trial_costs import TrialCosts
from tests.unit.orchestrator.train.precision.test_watch import stepper_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GOOD = Probe(noise_ratio=1e-4, norm_ratio=1.0, loss_gap=0.0)


def rounds(pairs: list[tuple[float, float]], device: torch.device = CPU) -> Comparison:
    comparison = Comparison(Tier.FP32, Tier.BF16, device)
    for base_s, tier_s in pairs:
        assert not comparison.is_over
        comparison.note(base_s, tier_s)
    return comparison


def test_a_tier_that_is_much_slower_is_given_up_after_one_pass_on_a_cpu() -> None:
    assert rounds([(0.3, 0.5)]).is_over
    assert not rounds([(0.3, 0.5)], GPU).is_over, "there the first pass loads kernels"
    assert not rounds([(0.3, 0.4)]).is_over
    assert not rounds([(0.003, 0.005)]).is_over, "so short a pass is cheap to repeat, and noisy"


def test_it_is_over_as_soon_as_one_is_clearly_faster() -> None:
    assert rounds([(0.3, 0.4), (0.3, 0.34)]).is_over
    assert rounds([(0.3, 0.4), (0.3, 0.2)]).is_over
    assert not rounds([(0.3, 0.4), (0.3, 0.31)]).is_over
    assert rounds([(0.3, 0.3)] * NUM_ROUNDS).is_over
    assert rounds([(0.001, 0.0001)] * NUM_ROUNDS).is_over


def test_what_is_known_stands_and_the_other_is_told_beside_it() -> None:
    comparison = Comparison(Tier.FP32, Tier.BF16, CPU)
    comparison.note(*comparison.take_round(lambda _: None))
    comparison.note(0.4, 0.2)
    known = TierCost(step_s=0.2, memory_bytes=7.0)
    costs = comparison.costs(known)
    assert costs[Tier.FP32] == known
    assert costs[Tier.BF16].step_s == pytest.approx(0.2 * comparison.ratio)
    assert costs[Tier.BF16].memory_bytes == 0.0


@pytest.mark.parametrize("growth", [1.0, 1.05, 0.95])
def test_replays_of_all_tiers_meet_the_neighbours_alike(growth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, load = 0.0, 1.0  # the neighbours' load grows or falls from replay to replay

    def replay(alone_s: float) -> None:
        nonlocal now_s, load
        now_s, load = now_s + alone_s * load, load * growth

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    found = time_replays({Tier.TF32: partial(replay, 0.002), Tier.BF16: partial(replay, 0.0015)})
    drift_within_a_round = growth**REPLAYS
    assert found[Tier.BF16] / found[Tier.TF32] == pytest.approx(0.75 * drift_within_a_round)
    assert found[Tier.TF32] == pytest.approx(0.002, rel=1e-6) if growth == 1.0 else found[Tier.TF32] > 0


def test_long_replays_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, count = 0.0, 0

    def replay(seconds: float) -> None:
        nonlocal now_s, count
        now_s, count = now_s + seconds, count + 1

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    time_replays({Tier.TF32: partial(replay, 0.001)})
    assert count == REPLAY_ROUNDS * REPLAYS
    count = 0
    time_replays({Tier.TF32: partial(replay, 0.1)})
    assert count == MIN_REPLAY_ROUNDS * REPLAYS
    assert time_replays({}) == {}


def test_tiers_are_measured_one_after_the_other_beside_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {Tier.FP32: 0.4, Tier.BF16: 0.2, Tier.INT8: 0.5}
    seen: list[tuple[Tier, Tier]] = []

    class Told(Comparison):
        def take_round(self, run: object) -> tuple[float, float]:
            seen.append((self.base, self.tier))
            self._memory = {self.base: 1.0, self.tier: 1.0}
            return seconds[self.base], seconds[self.tier]

    monkeypatch.setattr(trial_costs, "Comparison", Told)
    tiers = (Tier.FP32, Tier.BF16, Tier.INT8)
    costs = TrialCosts(stepper_of(tmp_path), CPU, None, key="k", cache=tmp_path / "c", tiers=tiers)
    while costs.next_tier is not None:
        costs.take_piece()
    assert seen == [(Tier.FP32, Tier.BF16)] * 2 + [(Tier.BF16, Tier.INT8)]
    assert {tier: cost.step_s for tier, cost in costs.known.items()} == pytest.approx(seconds)
    again = TrialCosts(stepper_of(tmp_path), CPU, None, key="k", cache=tmp_path / "c", tiers=(*tiers, Tier.FP16))
    assert (again.known, again.next_tier) == (costs.known, Tier.FP16)
    alone = TrialCosts(stepper_of(tmp_path), CPU, None, key="k", cache=None, tiers=tiers[:1])
    assert alone.next_tier is None, "there is nothing to compare it with"


def test_a_budget_is_spent_as_time_goes_by_with_some_in_advance() -> None:
    spending = Spending(budget=0.025, step_s=0.1)
    assert spending.steps_until(0.4, 0, 10_000) == 0, "20 s in advance are half a second"
    assert spending.steps_until(1.0, 0, 10_000) == 200
    assert spending.steps_until(1.0, 150, 10_000) == 50
    spending.spent_s = 1.0
    assert spending.steps_until(1.0, 150, 10_000) == 450


def test_what_saves_much_may_cost_part_of_that_in_advance_and_no_more() -> None:
    spending = Spending(budget=0.025, step_s=0.25)
    assert spending.steps_until(1.5, 10, 120) > 100, "a short trial has not the time for it"
    assert spending.steps_until(1.5, 10, 120, saving=0.4) == 0, "which saves 11 s"
    assert spending.steps_until(1.5, 10, 120, saving=0.1) > 100
    assert spending.steps_until(1.5, 100, 120, saving=0.4) > 0, "too late"
    assert spending.steps_until(6.0, 10, 100_000, saving=0.5) > 0, "some seconds at most"
    assert (spending.is_within(0.7, 10, 120), spending.is_within(0.8, 10, 120)) == (True, False)
    assert spending.is_within(0.8, 10, 120, saving=0.4), "what is sure to pay may cost more than the budget"


def test_a_tier_is_promising_until_a_probe_speaks_against_it_or_it_is_safe() -> None:
    guard = Guard((Tier.FP32, Tier.BF16, Tier.INT8))
    bad = Probe(noise_ratio=0.05, norm_ratio=1.0, loss_gap=0.0)
    assert guard.is_promising(Tier.BF16)
    for _ in range(2):
        guard.take_probe(Tier.FP32, {Tier.BF16: GOOD, Tier.INT8: bad})
        assert guard.is_promising(Tier.BF16)
        assert not guard.is_promising(Tier.INT8)
    guard.take_probe(Tier.FP32, {Tier.BF16: GOOD, Tier.INT8: GOOD})
    assert guard.is_safe(Tier.BF16)
    assert not guard.is_promising(Tier.BF16)
    assert not guard.is_promising(Tier.INT8)
