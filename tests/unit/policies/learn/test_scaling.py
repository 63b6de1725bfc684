"""Speed on any number of devices: what was true is found again, and what was never measured is bounded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from orchestrator.policies.learn.fit import Observation, TrialFit, update
from orchestrator.policies.learn.scaling import INTER_OVER_INTRA, ScalingModel, Sync, prior, solve_scaling
from orchestrator.policies.learn.speed import SpeedCell
from orchestrator.policies.tier import Tier

FLOOR_S, SLOPE_S = 0.02, 0.001
ALPHA_R_S, BETA_R_S, ALPHA_N_S = 0.03, 0.004, 0.08


def truth_s(workers: int, nodes: int, micro_batch: int, accum: int = 1, gamma: float = 1.0) -> float:
    micro = FLOOR_S + SLOPE_S * micro_batch
    sync = 0.0 if workers == 1 else (ALPHA_N_S if nodes > 1 else ALPHA_R_S + BETA_R_S * (workers - 2))
    return float((accum - 1) * micro + (micro**gamma + sync**gamma) ** (1 / gamma))


def cells(*seen: Observation) -> tuple[SpeedCell, ...]:
    return update(TrialFit(), [one for one in seen for _ in range(3)]).cells


def observed(
    workers: int = 1,
    nodes: int = 1,
    micro_batch: int = 16,
    *,
    accum: int = 1,
    gamma: float = 1.0,
    factor: float = 1.0,
    cores: float = 1.0,
    crowd: float = 0.0,
    tier: Tier = Tier.FP32,
    device_type: str = "h200",
    num_steps: int = 10,
) -> Observation:
    return Observation(
        cores=cores,
        tier=tier,
        micro_batch=micro_batch,
        grad_accum=accum,
        num_workers=workers,
        num_steps=num_steps,
        step_s=factor * truth_s(workers, nodes, micro_batch, accum, gamma),
        num_nodes=nodes,
        device_type=device_type,
        crowd_share=crowd,
    )


def step_s(model: ScalingModel, workers: int, micro_batch: int, accum: int = 1, *, spans_nodes: bool = False) -> float:
    line = model.line(Tier.FP32, "h200", {})
    assert line is not None
    one = np.ones(1)
    found = model.step_s(line, micro_batch * one, accum * one, workers * one, spans_nodes=spans_nodes)
    return float(found[0])


def test_nothing_measured_is_no_speed() -> None:
    model = solve_scaling(())
    assert (model.is_measured, model.max_workers, model.tiers()) == (False, 0, ())
    assert not solve_scaling(cells(observed(num_steps=1))).is_measured, "three steps are too few"


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_a_model_solved_from_a_few_cells_tells_the_others(gamma: float) -> None:
    grid = list(itertools.product((1, 2, 4), (8, 32)))
    model = solve_scaling(cells(*(observed(w, 1, m, gamma=gamma) for w, m in grid)))
    assert model.max_workers == 4
    for workers, micro_batch in ((1, 16), (3, 16), (8, 64)):
        assert step_s(model, workers, micro_batch) == pytest.approx(
            truth_s(workers, 1, micro_batch, gamma=gamma), rel=0.06
        )


def test_accumulation_synchronises_once_per_step() -> None:
    model = solve_scaling(cells(observed(1, 1, 8), observed(1, 1, 32), observed(2, 1, 16, accum=4)))
    assert step_s(model, 2, 16, 8) == pytest.approx(truth_s(2, 1, 16, 8), rel=0.02)


def test_several_nodes_have_a_synchronisation_of_their_own() -> None:
    model = solve_scaling(cells(observed(1, 1, 8), observed(1, 1, 32), observed(4), observed(8, 2)))
    assert step_s(model, 8, 16, spans_nodes=True) == pytest.approx(truth_s(8, 2, 16), rel=0.02)


def test_until_it_was_measured_several_nodes_are_a_little_slower_than_one() -> None:
    model = solve_scaling(cells(observed(1, 1, 8), observed(1, 1, 32), observed(2)))
    assert model.inter == Sync(model.intra.alpha_s * INTER_OVER_INTRA, model.intra.beta_s * INTER_OVER_INTRA)
    assert step_s(model, 2, 16, spans_nodes=True) > step_s(model, 2, 16)


def test_a_measured_wait_tells_compute_from_synchronisation_without_a_single_rank() -> None:
    whole = truth_s(2, 1, 16)
    seen = [
        Observation(
            cores=1.0,
            tier=Tier.FP32,
            micro_batch=micro_batch,
            grad_accum=1,
            num_workers=2,
            num_steps=10,
            step_s=truth_s(2, 1, micro_batch),
            device_type="h200",
            sync_s=ALPHA_R_S,
        )
        for micro_batch in (8, 16, 32)
    ]
    model = solve_scaling(cells(*seen))
    assert step_s(model, 2, 16) == pytest.approx(whole, rel=0.02)
    assert step_s(model, 1, 16) == pytest.approx(truth_s(1, 1, 16), rel=0.02)


def test_the_share_response_is_found_from_two_sizes_of_a_share() -> None:
    seen = [observed(cores=cores, factor=cores**-0.6) for cores in (2.0, 4.0, 8.0, 15.0)]
    model = solve_scaling(cells(*seen))
    assert model.exponent == pytest.approx(0.6, abs=0.05)
    assert model.response(0.5) == 0.5


def test_the_share_response_is_found_where_others_always_had_the_rest() -> None:
    seen = [observed(cores=15 * share, factor=share**-0.4, crowd=1 - share) for share in (0.125, 0.25, 0.5, 1.0)]
    assert solve_scaling(cells(*seen)).exponent == pytest.approx(0.4, abs=0.05)


def test_neighbours_cost_what_they_were_seen_to_cost_and_nothing_unseen() -> None:
    alone = [observed(1, 1, 8), observed(1, 1, 32)]
    assert solve_scaling(cells(*alone)).interference == 0.0
    crowded = solve_scaling(cells(*alone, observed(1, 1, 16, crowd=0.5, factor=1.2)))
    assert 0.2 < crowded.interference < 0.4, "0.4 per device, drawn to none by one measurement"


def test_a_type_that_was_not_measured_differs_by_its_speed_and_a_tier_is_unknown() -> None:
    model = solve_scaling(cells(observed(1, 1, 8), observed(1, 1, 32)))
    known = model.line(Tier.FP32, "h200", {})
    slow = model.line(Tier.FP32, "t4", {"h200": 1.0, "t4": 0.25})
    assert known is not None
    assert slow is not None
    assert slow.work_s(16) == pytest.approx(4 * known.work_s(16))
    assert model.line(Tier.BF16, "h200", {}) is None


def test_a_guess_about_a_shape_nobody_ran_treats_tiers_alike() -> None:
    model = prior(16, (Tier.FP32, Tier.BF16))
    assert model.tiers() == (Tier.BF16, Tier.FP32) or model.tiers() == (Tier.FP32, Tier.BF16)
    lines = {model.line(tier, "h200", {}) for tier in model.tiers()}
    assert len(lines) == 1


def test_errors_of_the_model_on_what_was_measured_are_its_spread() -> None:
    exact = solve_scaling(cells(observed(1, 1, 8), observed(1, 1, 16), observed(1, 1, 32)))
    off = solve_scaling(cells(observed(1, 1, 8), observed(1, 1, 16, factor=1.5), observed(1, 1, 32)))
    assert exact.spread < 0.05 < off.spread
