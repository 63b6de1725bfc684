"""What holds of every job: it learns, resumes bit-equal, and does not care how a global batch is cut."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from orchestrator.jobs.data import SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.job import Job
from orchestrator.jobs.table import JOB_INFO

CPU = torch.device("cpu")

TOLERANCE = {"speech": 1e-5}
"""Of a gradient, where its loss is large: CTC starts at tens of nats per utterance, the others at a few per element."""


def take_step(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, indices: list[int]) -> float:
    """One optimizer step; returns the mean loss before it."""
    optimizer.zero_grad()
    terms = job.loss(model, job.batch(indices, CPU))
    loss = terms.loss_sum / terms.num_elements
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def train(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, cursor: SampleCursor, steps: int
) -> list[float]:
    losses = []
    for _ in range(steps):
        indices, cursor = cursor.take(8)
        losses.append(take_step(job, model, optimizer, indices.tolist()))
    return losses


def start(job: Job, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, SampleCursor]:
    torch.manual_seed(seed)
    model = job.build_model()
    return model, job.build_optimizer(model), SampleCursor(seed=seed, num_samples=job.num_train_samples)


def gradient(job: Job, model: nn.Module, pieces: list[list[int]]) -> list[torch.Tensor]:
    """The mean gradient over all elements of the pieces, accumulated piece by piece."""
    model.zero_grad()
    num_elements = sum(job.num_elements(len(piece)) for piece in pieces)
    for piece in pieces:
        (job.loss(model, job.batch(piece, CPU)).loss_sum / num_elements).backward()  # type: ignore[no-untyped-call]
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


def test_three_steps_lower_the_loss(job: Job) -> None:
    model, optimizer, _ = start(job)
    indices = list(range(16))
    losses = [take_step(job, model, optimizer, indices) for _ in range(4)]
    assert losses[3] < losses[2] < losses[1] < losses[0]


def test_resume_is_bit_equal(job: Job) -> None:
    model, optimizer, cursor = start(job)
    train(job, model, optimizer, cursor, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    middle = SampleCursor(seed=0, num_samples=job.num_train_samples, position=24)
    expected = train(job, model, optimizer, middle, 3)

    resumed, resumed_optimizer, _ = start(job, seed=99)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    assert train(job, resumed, resumed_optimizer, middle, 3) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_same_global_batch_cut_otherwise_gives_the_same_gradient(
    job: Job, world_size: int, micro_batch: int
) -> None:
    model, _, cursor = start(job)
    indices, _ = cursor.take(13)
    whole = gradient(job, model, [indices.tolist()])
    pieces = [
        piece.tolist()
        for rank in range(world_size)
        for piece in micro_batches(rank_slice(indices, rank, world_size), micro_batch)
    ]
    cut = gradient(job, model, pieces)
    assert len(whole) == len(list(model.parameters()))
    for expected, seen in zip(whole, cut, strict=True):
        torch.testing.assert_close(seen, expected, atol=TOLERANCE.get(job.name, 1e-6), rtol=1e-5)


def test_a_model_follows_from_torchs_global_generator_alone(job: Job) -> None:
    same, _, _ = start(job, seed=5)
    again, _, _ = start(job, seed=5)
    other, _, _ = start(job, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(same.parameters(), other.parameters(), strict=True))


def test_data_leaves_the_global_generator_alone(job: Job) -> None:
    before = torch.get_rng_state()
    job.prepare()
    job.batch([0, 1], CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_is_the_same_in_every_batch_and_order(job: Job) -> None:
    last = job.num_train_samples - 1
    forward = job.batch([0, 5, last], CPU)
    backward = job.batch(SampleCursor(seed=0, num_samples=3).take(0)[0], CPU)
    assert all(len(part) == 0 for part in backward)
    for part, reordered in zip(forward, job.batch([last, 0], CPU), strict=True):
        assert torch.equal(part[[2, 0]], reordered)


def test_num_elements_is_what_the_loss_counts(job: Job) -> None:
    model, _, _ = start(job)
    for count in (1, 5):
        terms = job.loss(model, job.batch(list(range(count)), CPU))
        assert terms.num_elements == job.num_elements(count)
        assert terms.loss_sum.ndim == 0


def test_evaluate_has_the_metric_and_changes_nothing(job: Job) -> None:
    model, optimizer, cursor = start(job)
    before = copy.deepcopy(model.state_dict())
    first = job.evaluate(model, CPU)
    assert first == job.evaluate(model, CPU)
    assert first.keys() >= {job.metric}
    assert all(math.isfinite(value) for value in first.values())
    assert model.training
    assert all(param.grad is None for param in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    train(job, model, optimizer, cursor, 20)
    sign = 1 if JOB_INFO[job.name].mode == "min" else -1
    assert sign * job.evaluate(model, CPU)[job.metric] < sign * first[job.metric]


def test_evaluate_keeps_a_model_in_evaluation_mode(job: Job) -> None:
    model = job.build_model().eval()
    job.evaluate(model, CPU)
    assert not model.training


def test_blocks_are_disjoint_parts_of_the_model_in_order(job: Job) -> None:
    model = job.build_model()
    blocks = job.blocks(model)
    order = list(model.modules())
    positions = [order.index(block) for block in blocks]
    assert blocks
    assert positions == sorted(positions)
    inside = [id(param) for block in blocks for param in block.parameters()]
    assert len(inside) == len(set(inside)) < len(list(model.parameters()))


def test_every_matrix_product_is_a_plain_linear(job: Job) -> None:
    model = job.build_model()
    for module in model.modules():
        if hasattr(module, "weight") and module.weight.ndim == 2:
            assert type(module) in {nn.Linear, nn.Embedding}
    shared = [id(param) for _, param in model.named_parameters(remove_duplicate=False)]
    assert len(shared) == len(set(shared))
    assert all(param.dtype is torch.float32 for param in model.parameters())


def test_the_optimizer_has_every_parameter_once(job: Job) -> None:
    model, optimizer, _ = start(job)
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert sorted(held) == sorted(id(param) for param in model.parameters())


def test_the_learning_rate_rule_fits_the_optimizer(job: Job) -> None:
    _, optimizer, _ = start(job)
    rule = "linear" if isinstance(optimizer, torch.optim.SGD) else "sqrt"
    assert JOB_INFO[job.name].learning_rate_rule == rule
