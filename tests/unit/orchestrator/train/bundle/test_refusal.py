"""What cannot be stepped together says why, and is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orchestrator.policies.tier import Tier
from orchestrator.train.bundle.bundle import StackingError
from orchestrator.train.bundle.kind import kind_of, why_alone
from tests.unit.orchestrator.train.bundle.trials import Tokens, alone, bundle, member, stepper, weights


def test_rates_and_dropout_may_differ_but_not_layers_batch_tier_or_optimizer() -> None:
    kind = kind_of(stepper(Tokens()))
    alike = [Tokens(lr=0.5, decay=0.7, clip=None, dropout=0.3, beta2=0.9)]
    apart = [Tokens(optimizer="sgd"), Tokens(attention_dropout=0.1)]
    assert {kind_of(stepper(job)) == kind for job in alike} == {True}
    assert {kind_of(stepper(job)) == kind for job in apart} == {False}
    assert kind_of(stepper(Tokens(), micro_batch=4)) != kind
    assert kind_of(stepper(Tokens(), tier=Tier.BF16)) != kind


class Normed(Tokens):
    def build_model(self) -> nn.Module:
        return nn.Sequential(super().build_model(), nn.BatchNorm1d(8))


class Stateful(Tokens):
    def state_dict(self) -> dict[str, int]:
        return {"seen": 1}


class Momentless(Tokens):
    def build_optimizer(self, model: nn.Module) -> object:
        return torch.optim.RMSprop(model.parameters())


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (Normed(), "BatchNorm"),
        (Stateful(), "state of its own"),
        (Momentless(), "its optimizer is RMSprop; known: SGD, Adam, AdamW"),
    ],
)
def test_a_trial_that_cannot_be_stacked_says_why(job: Tokens, reason: str) -> None:
    assert reason in why_alone(stepper(job))


def test_tiers_with_functions_of_their_own_are_left_alone() -> None:
    assert why_alone(stepper(Tokens())) == ""
    assert "tier tf32 is computed by functions of its own" in why_alone(stepper(Tokens(), tier=Tier.TF32))


def test_a_loss_that_reads_a_hyper_parameter_is_found_and_named_by_its_row() -> None:
    members = [member(Tokens()), member(Tokens(), seed=4), member(Tokens(smoothing=0.2), seed=5)]
    before = [weights(each.stepper) for each in members]
    with pytest.raises(StackingError, match="differs from what the others' training computes") as raised:
        bundle(members)
    assert raised.value.row == 2
    for each, value in zip(members, before, strict=True):
        assert torch.equal(weights(each.stepper), value)
        alone(each.stepper, 1)  # still a trial of its own


class Branching(Tokens):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        found, count = super().loss(model, batch)
        return (found if float(found.detach()) > 0 else -found), count


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return self.inner(x)  # type: ignore[no-any-return]


class Counted(Tokens):
    def build_model(self) -> nn.Module:
        return Counting(super().build_model())


class Annealed(Tokens):
    calls = 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        self.calls += 1  # of this trial only
        return super().loss(model, batch)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, "cannot be stacked"),
        (Counted, "changes buffers, such as running means"),
        (Annealed, "its loss changes attributes of the training"),
    ],
)
def test_what_vmap_cannot_do_is_refused(kind: type[Tokens], reason: str) -> None:
    members = [member(kind()), member(kind(), seed=4)]
    with pytest.raises(StackingError, match=reason):
        bundle(members)
    assert [len(alone(each.stepper, 2)) for each in members] == [2, 2]
