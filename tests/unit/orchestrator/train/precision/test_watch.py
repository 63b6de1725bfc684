"""Calibration, probes and the way back, on one rank and without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs import build_job
from orchestrator.policies.tier import Tier
from orchestrator.train.precision import products
from orchestrator.train.precision.calibrate import CostFile, TierCost, calibration_key
from orchestrator.train.precision.guard import Cause
from orchestrator.train.precision.memory_state import capture, restore
from orchestrator.train.precision.probe import ProbeSetup, probe
from orchestrator.train.precision.range_signs import RangeMeter
from orchestrator.train.precision.tiers import install, set_tier
from orchestrator.train.precision.watch import PrecisionWatch, StepNews, WatchPlan
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK, order

CPU = torch.device("cpu")
COSTS = {Tier.FP32: TierCost(step_s=1.0, memory_bytes=4.0), Tier.BF16: TierCost(step_s=0.5, memory_bytes=2.0)}


def trial(directory: Path) -> TrialOrder:
    found = order(directory).trial
    assert found is not None
    return found


def stepper_of(directory: Path) -> Stepper:
    first = trial(directory)
    torch.manual_seed(first.seed)
    job = build_job(first.job, first.params)
    job.prepare()
    return Stepper(first, job, ONE_RANK)


def watch_of(stepper: Stepper, **changes: Any) -> PrecisionWatch:
    values = {"ladder": (Tier.FP32, Tier.BF16), "budget": 0.5, "target_samples": 320, "costs": COSTS}
    return PrecisionWatch(WatchPlan(**{**values, **changes}), stepper, CPU, None)


def news(loss: float, is_skipped: bool = False) -> StepNews:
    """Of a step said to be so long that the budget allows every probe, however slow this machine is just now."""
    return StepNews(is_skipped=is_skipped, is_loss_finite=True, loss=loss, loss_scale=1.0, busy_s=10.0)


def steps(stepper: Stepper, watch: PrecisionWatch, num: int) -> list[Any]:
    moves = []
    for _ in range(num):
        moves.append(watch.before_step())
        result = stepper.step()
        moves.append(watch.after_step(news(result.loss, result.is_skipped)))
    return [move for move in moves if move is not None]


def test_probes_and_calibration_leave_no_trace_in_what_is_trained(tmp_path: Path) -> None:
    plain, watched = stepper_of(tmp_path), stepper_of(tmp_path)
    watch = watch_of(watched, costs=None)
    torch.manual_seed(5)
    expected = [plain.step().loss for _ in range(30)]
    torch.manual_seed(5)
    watch.begin()
    got = []
    for _ in range(30):
        watch.before_step()
        result = watched.step()
        got.append(result.loss)
        watch.after_step(news(result.loss))
    assert watch.guard.num_probes > 0
    assert got == expected, "bit for bit"


def test_a_good_cheaper_tier_is_found_safe_and_said_so(tmp_path: Path) -> None:
    stepper = stepper_of(tmp_path)
    watch = watch_of(stepper)
    watch.begin()
    first = watch.news()
    assert first is not None
    assert [(fit.tier, fit.is_safe) for fit in first] == [(Tier.FP32, True), (Tier.BF16, False)]
    assert watch.news() is None
    assert steps(stepper, watch, 39) == []
    news = watch.news()
    assert news is not None
    assert news[1].is_safe
    assert news[1].noise_ratio is not None
    assert 0 < news[1].noise_ratio < 0.01
    assert (news[1].num_layers, news[1].num_in_tier) == (3, 3)


def test_a_tier_that_is_no_faster_is_not_even_probed(tmp_path: Path) -> None:
    stepper = stepper_of(tmp_path)
    watch = watch_of(stepper, costs={**COSTS, Tier.BF16: TierCost(step_s=1.1, memory_bytes=2.0)})
    watch.begin()
    steps(stepper, watch, 20)
    fits = watch.known()
    assert (fits[1].is_safe, fits[1].noise_ratio) == (False, None)


def test_without_a_budget_nothing_is_probed_and_nothing_is_said(tmp_path: Path) -> None:
    stepper = stepper_of(tmp_path)
    watch = watch_of(stepper, budget=0.0)
    watch.begin()
    steps(stepper, watch, 20)
    assert (watch.news(), watch.guard.num_probes, watch.spent_s) == (None, 0, 0.0)


def test_a_tier_that_becomes_noisy_is_left_at_the_next_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = stepper_of(tmp_path)
    watch = watch_of(stepper)
    watch.begin()
    stepper.turn(grant_tier(stepper, Tier.BF16))

    def noisy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return products.fp32_linear(x, weight * (1 + torch.randn_like(weight)), bias)

    products.function_of.cache_clear()
    monkeypatch.setitem(products.TIER_FUNCTIONS, Tier.BF16, noisy)
    set_tier(stepper.model, Tier.FP32)
    set_tier(stepper.model, Tier.BF16)
    moves = steps(stepper, watch, 12)
    products.function_of.cache_clear()
    assert moves[0].tier is Tier.FP32
    assert moves[0].cause is Cause.PROBE
    assert "of the batch's noise" in moves[0].reason or "times as long" in moves[0].reason


def grant_tier(stepper: Stepper, tier: Tier) -> Any:
    import dataclasses

    return dataclasses.replace(stepper.settings, tier=tier)


def test_the_way_back_restores_model_optimizer_and_position(tmp_path: Path) -> None:
    stepper = stepper_of(tmp_path)
    for _ in range(3):
        stepper.step()
    state = capture(stepper.model, stepper.optimizer, stepper.position())
    torch.manual_seed(9)
    expected = [stepper.step().loss for _ in range(4)]
    stepper.go_back(restore(state, stepper.model, stepper.optimizer))
    assert stepper.step_index == 3
    torch.manual_seed(9)
    assert [stepper.step().loss for _ in range(4)] == expected


def test_a_tier_in_which_everything_vanishes_is_left_after_one_step(tmp_path: Path) -> None:
    coarse = Tier("fixed(1,6)")
    stepper = stepper_of(tmp_path)
    watch = watch_of(
        stepper, ladder=(Tier.FP32, coarse), costs={**COSTS, coarse: TierCost(step_s=0.3, memory_bytes=1.0)}
    )
    watch.begin()
    stepper.turn(grant_tier(stepper, coarse))
    watch.turned()
    moves = steps(stepper, watch, 1)
    assert [(move.tier, move.cause) for move in moves] == [(Tier.FP32, Cause.RANGE)]
    assert "vanishes" in moves[0].reason
    hooks = [len(layer._forward_hooks) for layer in stepper.model.modules()]
    assert sum(hooks) == 0, "steps that are not counted pay nothing"


@pytest.mark.parametrize("other", [Tier.FP32, Tier.BF16])
def test_a_tier_may_be_left_between_the_decision_to_count_its_range_and_the_step(tmp_path: Path, other: Tier) -> None:
    stepper = stepper_of(tmp_path)
    watch = watch_of(stepper, ladder=(Tier.FP32, Tier.BF16, Tier.INT8))
    watch.begin()
    stepper.turn(grant_tier(stepper, Tier.INT8))
    watch.turned()
    watch.before_step()
    stepper.turn(grant_tier(stepper, other))  # by an order that came at that boundary
    watch.turned()
    stepper.step()
    assert sum(len(layer._forward_hooks) for layer in stepper.model.modules()) == 0


def test_counting_what_falls_out_of_range_changes_no_step(tmp_path: Path) -> None:
    for word in ("int8", "fp8", "fp16", "fixed(8,16)"):
        plain, counted = stepper_of(tmp_path), stepper_of(tmp_path)
        meter, losses = RangeMeter(), []
        for stepper in (plain, counted):
            stepper.turn(grant_tier(stepper, Tier(word)))
            torch.manual_seed(4)
            if stepper is counted:
                meter.begin(stepper.model)
            losses.append([stepper.step().loss for _ in range(2)])
        assert losses[0] == losses[1], word
        found = meter.end()
        assert found is not None
        assert found.saturated == 0, word
        assert found.vanished < 0.5, word
    assert meter.end() is None


@pytest.mark.parametrize(
    ("word", "values", "saturated", "vanished"),
    [
        ("fixed(4,8)", [0.0, 0.02, 1.0, 9.0], 1 / 3, 1 / 3),
        ("fixed(4,8,stochastic)", [0.0, 0.02, 1.0, 9.0], 1 / 3, 0.0),
        ("fp16", [1e-9, 1.0, 1e6, float("nan")], 0.5, 0.25),
        ("fp8", [1e-9, 1.0, 448.0, 7.0], 0.0, 0.25),
        ("int8", [1e-3, 1.0, 2.0, 3.0], 0.0, 0.25),
    ],
)
def test_what_falls_out_of_range_is_counted(word: str, values: list[float], saturated: float, vanished: float) -> None:
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    install(layer)
    set_tier(layer, Tier(word))
    meter = RangeMeter()
    meter.begin(layer)
    layer(torch.tensor(values * 4).expand(16, 16))
    found = meter.end()
    assert found is not None
    assert (found.saturated, found.vanished) == pytest.approx((saturated, vanished))


def test_a_hard_fault_without_a_state_to_go_back_to_is_said(tmp_path: Path) -> None:
    watch = watch_of(stepper_of(tmp_path))
    watch.begin()
    assert not watch.go_back()


def test_who_begins_in_a_cheaper_tier_can_go_back_from_the_first_step_on(tmp_path: Path) -> None:
    stepper = stepper_of(tmp_path)
    stepper.turn(replace(stepper.settings, tier=Tier.BF16))
    watch = watch_of(stepper)
    watch.begin()
    before = [param.detach().clone() for param in stepper.model.parameters()]
    steps(stepper, watch, 1)
    assert any(not torch.equal(*pair) for pair in zip(before, stepper.model.parameters(), strict=True))
    assert watch.go_back()
    assert all(torch.equal(*pair) for pair in zip(before, stepper.model.parameters(), strict=True))
    assert (stepper.step_index, stepper.cursor.position) == (0, 0)


def test_a_probe_sees_a_bias_that_no_batch_averages_away() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    install(model)
    x, y = torch.randn(64, 8), torch.randn(64, 4)

    def gradient(tier: Tier, half: int) -> float:
        set_tier(model, tier)
        part = slice(32 * half, 32 * half + 32)
        loss = (model(x[part]) - y[part]).square().mean()
        loss.backward()
        return float(loss.detach())

    tiers = [Tier.TF32, Tier.BF16, Tier("fixed(8,16)"), Tier("fixed(2,8,floor)")]

    def ratios(batch_samples: int) -> list[float]:
        setup = ProbeSetup(model=model, half_samples=32, batch_samples=batch_samples, group=None, device=CPU, seed=1)
        found, _ = probe(setup, gradient, Tier.FP32, tiers)
        assert all(0.5 < seen.norm_ratio < 2 for seen in found.values())
        return [seen.noise_ratio for seen in found.values()]

    small, large = ratios(64), ratios(64_000)
    assert small[0] < small[1] < 0.025
    assert small[3] > 0.1
    assert large[3] > 100 * small[3], "floor is a bias, and stays while the noise of a large batch goes"


def test_costs_are_kept_and_read_back(tmp_path: Path) -> None:
    key = calibration_key("mlp", ["width=3"], 8, 1, CPU)
    assert key != calibration_key("mlp", ["width=3"], 8, 1, CPU, mode="graph")
    file = CostFile.of(tmp_path / "made", key)
    assert file.load(key, [Tier.FP32]) is None
    file.store(key, COSTS)
    assert file.load(key, [Tier.FP32, Tier.BF16]) == COSTS
    assert file.load(key, [Tier.FP8]) is None, "a tier that was not measured then"
    assert file.load("another", [Tier.FP32]) is None
    int8 = {Tier.INT8: TierCost(step_s=0.4, memory_bytes=1.0)}
    file.store(key, int8)
    assert file.load(key, [Tier.FP32, Tier.INT8, Tier.FP8]) == {Tier.FP32: COSTS[Tier.FP32], **int8}, "what was stays"
    file.path.write_text("{")
    assert file.load(key, [Tier.FP32]) is None


def test_only_the_first_trial_of_a_shape_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.train.precision.watch.is_real", lambda *_: True)
    stepper = stepper_of(tmp_path)
    first = watch_of(stepper, costs=None, key="k", cache=tmp_path / "c")
    first.begin()
    assert (first.costs, [fit.is_real for fit in first.known()]) == ({}, [True, True])
    steps(stepper, first, 20)
    assert set(first.costs) == {Tier.FP32, Tier.BF16}
    second = watch_of(stepper_of(tmp_path), costs=None, key="k", cache=tmp_path / "c")
    second.begin()
    assert second.costs == first.costs
    assert second.spent_s < first.spent_s


def test_a_tier_that_is_emulated_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.train.precision.watch.is_real", lambda *asked: asked[0] is Tier.FP32)
    stepper = stepper_of(tmp_path)
    watch = watch_of(stepper, costs=None)
    watch.begin()
    assert steps(stepper, watch, 20) == []
    assert (watch.costs, [fit.is_real for fit in watch.known()]) == ({}, [True, False])
