"""The differenced noise estimator against the true covariance of per-sample gradients."""

import statistics
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.train.batch.meter import EARLY_DRAWS, NoiseMeter, PairPart
from orchestrator.train.batch.noise import HalfNoise, NoiseEstimate, RecordedPair

POOL = 256


def pair(first: list[Tensor], second: list[Tensor], batch: int = 8) -> NoiseEstimate | None:
    """What two steps of plain SGD with these gradients give."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in first]
    noise, found = RecordedPair(params, torch.optim.SGD(params, lr=0.1)), torch.zeros(2, dtype=torch.float64)
    noise.make_room()
    for work, grads in ((noise.hold, first), (partial(noise.compare, found), second)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        work()
        assert all(
            torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True) if param.grad is not None
        )
    dot, difference_sq = found.tolist()
    return RecordedPair.estimate((dot, difference_sq), batch)


def per_sample_gradients() -> tuple[nn.Module, Tensor]:
    """A small classifier and the flat gradient of each of `POOL` samples."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(POOL, 10, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(POOL, generator=generator) > 0).long()
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    rows = []
    for i in range(POOL):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return model, torch.stack(rows)


@pytest.mark.parametrize("batch", [16, 64])
def test_the_median_of_many_draws_is_near_the_true_covariance(batch: int) -> None:
    _, gradients = per_sample_gradients()
    mean = gradients.mean(0)
    true_trace = float((gradients - mean).square().sum(1).mean())
    true_sq = float(mean.square().sum())
    generator = torch.Generator().manual_seed(7)
    draws = []
    for _ in range(200):
        halves = [gradients[torch.randint(POOL, (batch,), generator=generator)].mean(0) for _ in range(2)]
        parts = [list(torch.split(half, 30)) for half in halves]  # a model has several parameters
        draw = pair(parts[0], parts[1], batch)
        assert draw is not None
        draws.append(draw)
    assert statistics.median(d.noise_trace for d in draws) == pytest.approx(true_trace, rel=0.25)
    assert statistics.median(d.grad_sq for d in draws) == pytest.approx(true_sq, rel=0.25)


@given(
    first=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6),
    second=st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6),
    batch=st.integers(1, 100),
)
def test_the_forms_without_cancellation_are_the_published_ones(
    first: list[float], second: list[float], batch: int
) -> None:
    g1, g2 = torch.tensor(first, dtype=torch.float64), torch.tensor(second[: len(first)], dtype=torch.float64)
    estimate = pair([g1], [g2], batch)
    mean_sq = float(g1.square().sum() + g2.square().sum()) / 2
    sq_mean = float(((g1 + g2) / 2).square().sum())
    assert estimate is not None
    assert estimate.grad_sq == pytest.approx(2 * sq_mean - mean_sq, rel=1e-9, abs=1e-9)
    assert estimate.noise_trace == pytest.approx((mean_sq - sq_mean) * 2 * batch, rel=1e-9, abs=1e-9)


def test_two_steps_of_every_period_are_a_pair_unless_something_comes_between() -> None:
    model = nn.Linear(2, 2)
    meter = NoiseMeter(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    hold, compare = PairPart.HOLD, PairPart.COMPARE

    def parts(num_steps: int) -> dict[int, PairPart]:
        return {step: part for step in range(num_steps) if (part := meter.begin_replayed(step)) is not None}

    assert parts(70) == {32: hold, 33: compare, 48: hold, 49: compare, 64: hold, 65: compare}
    for _ in range(EARLY_DRAWS):
        meter.keep(NoiseEstimate(noise_trace=1.0, grad_sq=1.0))
    assert parts(200) == {64: hold, 65: compare, 128: hold, 129: compare, 192: hold, 193: compare}
    assert meter.begin_replayed(65) is None, "nothing was kept in the step before"
    for between in (meter.reset, lambda: meter.begin(64)):
        assert meter.begin_replayed(64) is hold
        between()
        assert meter.begin_replayed(65) is None


def test_a_gradient_that_is_not_finite_gives_no_estimate() -> None:
    assert pair([torch.tensor([1.0, float("inf")])], [torch.ones(2)]) is None


def test_parameters_without_a_gradient_are_left_out() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    noise, found = RecordedPair(params, torch.optim.SGD(params, lr=0.1)), torch.zeros(2)
    noise.make_room()
    for value, work in ((1.0, noise.hold), (2.0, partial(noise.compare, found))):
        params[1].grad = torch.full((3,), value)
        work()
    assert found.tolist() == [6.0, 3.0]


def halves(rows: Tensor, first: int, weights: list[Tensor] | None = None) -> NoiseEstimate:
    """The estimate from samples whose gradients are `rows`, as a step adds them up."""
    estimator = HalfNoise()
    whole = rows.mean(0)
    estimator.hold([8.0 * rows[:first].sum(0) / len(rows)], first, grad_scale=8.0)
    estimate = estimator.observe([whole], len(rows), weights=weights)
    assert estimate is not None
    return estimate


def test_two_halves_of_a_step_say_what_their_samples_are() -> None:
    generator = torch.Generator().manual_seed(3)
    true_gradient = torch.tensor([1.0, -2.0, 0.5])
    scale = torch.tensor([2.0, 1.0, 3.0])
    draws = [halves(true_gradient + scale * torch.randn(12, 3, generator=generator), first) for first in (6, 5) * 2_000]
    assert statistics.fmean(d.grad_sq for d in draws) == pytest.approx(5.25, rel=0.05)
    assert statistics.fmean(d.noise_trace for d in draws) == pytest.approx(14.0, rel=0.05)


def test_halves_are_weighed_as_adam_does() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    plain, weighed = halves(rows, 1), halves(rows, 1, [torch.tensor([10.0, 1.0])])
    assert (plain.grad_sq, plain.noise_trace) == pytest.approx((1 * 3 + 2 * 2, 4 / 2))
    assert (weighed.grad_sq, weighed.noise_trace) == pytest.approx((100 * 3 + 4, 400 / 2))


def test_without_a_first_half_there_is_no_estimate() -> None:
    estimator = HalfNoise()
    assert estimator.observe([torch.ones(2)], 8) is None
    estimator.hold([torch.ones(2)], 4)
    estimator.reset()
    assert estimator.observe([torch.ones(2)], 8) is None
    estimator.hold([torch.tensor([1.0, float("inf")])], 4)
    assert estimator.observe([torch.ones(2)], 8) is None
