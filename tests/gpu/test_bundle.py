"""Trials stepped as one on a GPU, from recorded steps, train as they do alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.policies.tier import Tier
from orchestrator.train.bundle.bundle import Bundle
from orchestrator.train.bundle.forward import forward_of
from orchestrator.train.groups import Ranks
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.recorder import CudaRecorder
from tests.unit.orchestrator.train.bundle.test_bundle import OWN
from tests.unit.orchestrator.train.bundle.trials import Tokens, alone, member, stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]


def ranks() -> Ranks:
    return Ranks(rank=0, world_size=1, device=torch.device("cuda", 0), step_mode=StepMode.EAGER)


def bundled(num_steps: int, jobs: list[Tokens], **dials: Any) -> list[list[float]]:
    members = [member(job, seed=index, ranks=ranks(), **dials) for index, job in enumerate(jobs)]
    whole = Bundle(members, forward_of(members[0]), recorder=CudaRecorder())
    steps = [whole.advance() for _ in range(num_steps)]
    whole.close()
    return [[step[row][0].loss for step in steps] for row in range(len(jobs))]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_recorded_bundles_give_the_losses_of_separate_trials(optimizer: str) -> None:
    jobs = [Tokens(**own, optimizer=optimizer) for own in OWN]
    found = bundled(40, jobs)
    for index, job in enumerate(jobs):
        wanted = alone(stepper(job, seed=index, ranks=ranks()), 40)
        assert found[index] == pytest.approx(wanted, rel=1e-5)


def test_bf16_differs_no_more_than_its_own_rounding() -> None:
    jobs = [Tokens(**own) for own in OWN]
    found = torch.tensor(bundled(20, jobs, tier=Tier.BF16))
    exact, half = (
        torch.tensor([alone(stepper(job, seed=i, ranks=ranks(), tier=tier), 20) for i, job in enumerate(jobs)])
        for tier in (Tier.FP32, Tier.BF16)
    )
    assert (found - half).abs().max() <= 2 * (half - exact).abs().max()


def test_dropout_masks_do_not_depend_on_who_is_in_the_bundle() -> None:
    jobs = [Tokens(**own, dropout=0.2, attention_dropout=0.1) for own in OWN]
    three, two = bundled(20, jobs), bundled(20, jobs[:2])
    assert three[0] == pytest.approx(two[0], rel=1e-5)
    assert three[0] != pytest.approx(bundled(20, [Tokens(**OWN[0]), Tokens(**OWN[1])])[0], rel=1e-3)


def test_many_steps_in_a_row_read_ahead_and_are_those_steps() -> None:
    jobs = [Tokens(**own) for own in OWN]
    members = [member(job, seed=index, ranks=ranks()) for index, job in enumerate(jobs)]
    whole = Bundle(members, forward_of(members[0]), recorder=CudaRecorder())
    found = []
    while members[0].stepper.step_index < 400:
        found += whole.advance(1000, target_s=1.0)[0]
    wanted = alone(stepper(jobs[0], seed=0, ranks=ranks()), members[0].stepper.step_index)
    assert max(result.num_steps for result in found) > 8
    for result in found:
        mean = sum(wanted[result.step : result.step + result.num_steps]) / result.num_steps
        assert result.loss == pytest.approx(mean, rel=1e-3)
