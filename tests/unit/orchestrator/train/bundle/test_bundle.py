"""Trials stepped as one train as they do alone: losses, weights, checkpoints, whoever enters or leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.policies.tier import Tier
from orchestrator.train import manifest
from orchestrator.train.batch.noise import RecordedPair
from orchestrator.train.bundle.bundle import StackingError
from orchestrator.train.bundle.member import Member
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.bundle.trials import Tokens, alone, bundle, member, stepper, weights

OWN: tuple[dict[str, Any], ...] = (
    {"lr": 0.003, "decay": 0.0, "clip": 0.5},
    {"lr": 0.01, "decay": 0.3, "clip": None, "beta2": 0.999},
    {"lr": 0.03, "decay": 0.1, "clip": 2.0, "clip_value": 0.01},
)
"""What three trials of a search differ in."""


def twins(num_steps: int, *, dials: dict[str, Any] | None = None, **shared: object) -> None:
    """Step the three as a bundle and alone, and compare losses of every step and weights at the end."""
    trained = [alone_losses(Tokens(**{**own, **shared}), num_steps, i, dials or {}) for i, own in enumerate(OWN)]
    members = [member(Tokens(**{**own, **shared}), seed=i, **(dials or {})) for i, own in enumerate(OWN)]
    whole = bundle(members)
    losses: list[list[float]] = [[] for _ in members]
    for _ in range(num_steps):
        for found, results in zip(losses, whole.advance(), strict=True):
            found += [result.loss for result in results]
    whole.close()
    for found, (expected, made), each in zip(losses, trained, members, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
        torch.testing.assert_close(weights(each.stepper), weights(made), rtol=1e-4, atol=2e-6)


def alone_losses(job: Tokens, num_steps: int, seed: int, dials: dict[str, Any]) -> tuple[list[float], Stepper]:
    made = stepper(job, seed=seed, **dials)
    return alone(made, num_steps), made


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "nesterov"])
def test_losses_and_weights_are_those_of_separate_trials(optimizer: str) -> None:
    twins(50, optimizer=optimizer)


@pytest.mark.parametrize("schedule", ["cosine", "one cycle"])
def test_each_trial_follows_its_own_schedule(schedule: str) -> None:
    twins(30, optimizer="sgd", schedule=schedule)


def test_dropout_draws_what_each_trial_alone_draws() -> None:
    twins(20, dropout=0.2, attention_dropout=0.1)


def test_accumulated_micro_batches_add_up_as_they_do_alone() -> None:
    twins(20, dials={"micro_batch": 4, "grad_accum": 3})


def test_bf16_differs_no_more_than_its_own_rounding() -> None:
    jobs = [Tokens(**own) for own in OWN]
    exact, half = (
        [alone(stepper(job, seed=i, tier=tier), 20) for i, job in enumerate(jobs)] for tier in (Tier.FP32, Tier.BF16)
    )
    members = [member(job, seed=i, tier=Tier.BF16) for i, job in enumerate(jobs)]
    found = steps_of(members, 20)
    noise = (torch.tensor(half) - torch.tensor(exact)).abs().max()
    assert (torch.tensor(found) - torch.tensor(half)).abs().max() <= 2 * noise


def steps_of(members: Sequence[Member], num_steps: int) -> list[list[float]]:
    whole = bundle(list(members))
    found = [whole.advance() for _ in range(num_steps)]
    whole.close()
    return [[step[row][0].loss for step in found] for row in range(len(members))]


@pytest.mark.parametrize(("phases", "dropout"), [((10, 15, 15, 10), 0.0), ((4, 5, 5, 4), 0.1)])
def test_trials_enter_and_leave_through_checkpoints_as_if_alone(
    phases: tuple[int, ...], dropout: float, tmp_path: Path
) -> None:
    """With dropout below 20 steps: from there on a trial alone is cut in halves, which changes what it draws."""
    jobs = [Tokens(**own, dropout=dropout) for own in OWN]
    expected = [alone_losses(job, sum(phases), i, {}) for i, job in enumerate(jobs)]
    first = member(jobs[0], seed=0)
    losses: list[list[float]] = [alone(first.stepper, phases[0]), [], []]
    first.generator.set_state(torch.get_rng_state())
    first = reloaded(first, jobs[0], 0, tmp_path / "alone")  # from alone into a bundle
    second, third = member(jobs[1], seed=1), member(jobs[2], seed=2)
    advance({0: first, 1: second}, phases[1], losses)
    advance({0: first, 1: second, 2: third}, phases[2], losses)  # one enters
    advance({1: second, 2: third}, phases[3], losses)  # one leaves
    first = reloaded(first, jobs[0], 0, tmp_path / "left")  # from a bundle into another process
    torch.set_rng_state(first.generator.get_state())
    losses[0] += alone(first.stepper, phases[3])
    for found, (wanted, _) in zip(losses, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted[: len(found)]), rtol=1e-5, atol=0)
    assert len(losses[0]) == sum(phases)
    torch.testing.assert_close(weights(first.stepper), weights(expected[0][1]), rtol=1e-4, atol=2e-6)


def advance(members: dict[int, Member], num_steps: int, losses: list[list[float]]) -> None:
    whole = bundle(list(members.values()))
    for _ in range(num_steps):
        for index, results in zip(members, whole.advance(), strict=True):
            losses[index] += [result.loss for result in results]
    whole.close()


def reloaded(left: Member, job: Tokens, seed: int, directory: Path) -> Member:
    """The same trial from its checkpoint, as another process would begin it."""
    torch.set_rng_state(left.generator.get_state())
    path = left.stepper.commit(directory, {})
    again = member(job, seed=seed)
    again.stepper.resume(path)
    again.generator.set_state(torch.get_rng_state())
    return again


def test_a_commit_of_a_member_is_that_of_a_single_trial(tmp_path: Path) -> None:
    made = stepper(Tokens(), seed=1)
    alone(made, 5)
    members = [member(Tokens(), seed=1), member(Tokens(lr=0.1), seed=2)]
    whole = bundle(members)
    for _ in range(5):
        whole.advance()
    inside = manifest.read(members[0].stepper.commit(tmp_path / "inside", {}))
    whole.close()
    outside = manifest.read(members[0].stepper.commit(tmp_path / "outside", {}))
    single = manifest.read(made.commit(tmp_path / "single", {}))
    assert inside.tensors == outside.tensors == single.tensors
    sizes = {entry.name: entry.size_bytes for entry in single.files if entry.name.endswith(".distcp")}
    assert {entry.name: entry.size_bytes for entry in inside.files if entry.name in sizes} == sizes


def test_many_steps_in_a_row_are_those_steps_one_by_one() -> None:
    wanted, _ = alone_losses(Tokens(**OWN[0]), 45, 0, {})
    members = [member(Tokens(**own), seed=i) for i, own in enumerate(OWN)]
    whole = bundle(members)
    found = []
    while members[0].stepper.step_index < 45:
        results = whole.advance(45 - members[0].stepper.step_index, target_s=10.0)[0]
        found += [(result.step, result.num_steps, result.loss, result.num_samples) for result in results]
    assert max(num_steps for _, num_steps, _, _ in found) > 1
    for step, num_steps, loss, num_samples in found:
        assert loss == pytest.approx(sum(wanted[step : step + num_steps]) / num_steps, rel=1e-5)
        assert num_samples == 8 * num_steps


def test_a_member_whose_gradient_is_not_finite_leaves_the_others_untouched() -> None:
    wanted, _ = alone_losses(Tokens(**OWN[0]), 12, 0, {})
    members = [member(Tokens(**OWN[0]), seed=0), member(Tokens(**OWN[1]), seed=1)]
    whole = bundle(members)
    losses = [whole.advance()[0][0].loss for _ in range(4)]
    with torch.no_grad():
        next(iter(members[1].stepper.model.parameters()))[:] = float("nan")
    before = members[1].stepper.cursor, members[1].stepper.step_index
    untouched, skipped = whole.advance(8, target_s=10.0)
    losses += [result.loss * result.num_steps for result in untouched]
    assert [result.is_skipped for result in skipped] == [True]
    assert not skipped[0].is_loss_finite
    assert (members[1].stepper.cursor, members[1].stepper.step_index) == before
    assert members[0].stepper.step_index == 12
    assert sum(losses) == pytest.approx(sum(wanted), rel=1e-5)


def test_rows_that_are_nobodys_change_nothing() -> None:
    wanted, made = alone_losses(Tokens(**OWN[2]), 10, 2, {})
    members = [member(Tokens(**OWN[2]), seed=2), member(Tokens(**OWN[0]), seed=0)]
    whole = bundle(members, num_rows=4)
    found = [whole.advance()[0][0].loss for _ in range(10)]
    whole.close()
    assert found == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(weights(members[0].stepper), weights(made), rtol=1e-4, atol=2e-6)


class Again:
    """Records by keeping the work: what a CUDA graph does, as far as it can be seen from outside."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        return work

    def rehearse(self, work: Callable[[], None], *, may_wait: bool = False) -> None:
        work()


@pytest.mark.parametrize("dials", [{}, {"micro_batch": 4, "grad_accum": 2}])
def test_recorded_steps_are_those_steps(dials: dict[str, Any]) -> None:
    wanted, _ = alone_losses(Tokens(**OWN[1]), 40, 1, dials)
    recorder = Again()
    members = [member(Tokens(**own), seed=i, **dials) for i, own in enumerate(OWN)]
    whole = bundle(members, recorder=recorder)
    found = [whole.advance()[1][0] for _ in range(40)]
    assert [result.loss for result in found] == pytest.approx(wanted, rel=1e-5)
    assert {result.mode for result in found} == {StepMode.GRAPH}
    assert recorder.num_recorded == 5  # only what was asked for, with both halves of a pair


def test_noise_is_that_of_two_steps_in_a_row_of_the_trial_alone() -> None:
    own = OWN[0]
    made = stepper(Tokens(**own), seed=0)
    pair = RecordedPair(list(made.model.parameters()), made.optimizer)
    members = [member(Tokens(**own), seed=0), member(Tokens(**OWN[1]), seed=1)]
    whole = bundle(members)
    results = [whole.advance()[0][0] for _ in range(34)]
    drawn = {result.step: result.noise for result in results if result.noise is not None}
    assert list(drawn) == [33]
    assert members[0].stepper.noise.mean.count == 1
    alone(made, 32)
    products = torch.zeros(2)
    for number in range(2):
        indices, _ = made.cursor.take(8)
        made.gradients.add(indices, 8, made.settings)
        if number == 0:
            pair.make_room()
            pair.hold()
            made.optimizer.zero_grad()
            alone(made, 1)
        else:
            pair.compare(products)
    wanted = RecordedPair.estimate((float(products[0]), float(products[1])), 8)
    assert wanted is not None
    assert drawn[33] is not None
    assert drawn[33].noise_trace == pytest.approx(wanted.noise_trace, rel=1e-3)
    assert drawn[33].grad_sq == pytest.approx(wanted.grad_sq, rel=1e-3, abs=1e-3 * wanted.noise_trace)


def test_a_compiled_pass_gives_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for torch.compile; compiling itself takes a minute here and is tried on a GPU."""
    monkeypatch.setattr(torch, "compile", lambda traced, **_: traced)
    wanted, _ = alone_losses(Tokens(**OWN[0]), 12, 0, {})
    members = [member(Tokens(**own), seed=i) for i, own in enumerate(OWN)]
    whole = bundle(members, is_compiled=True)
    assert [whole.advance()[0][0].loss for _ in range(12)] == pytest.approx(wanted, rel=1e-5)


def test_dropout_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda traced, **_: traced)
    members = [member(Tokens(dropout=0.1)), member(Tokens(dropout=0.1), seed=1)]
    with pytest.raises(StackingError, match="not compiled"):
        bundle(members, is_compiled=True)


def test_members_that_wait_stay_as_they_are_while_the_others_go_on() -> None:
    expected = [alone_losses(Tokens(**own), 12, i, {})[0] for i, own in enumerate(OWN)]
    members = [member(Tokens(**own), seed=i) for i, own in enumerate(OWN)]
    whole = bundle(members)
    losses: list[list[float]] = [[], [], []]
    for number in range(18):
        active = [row for row in range(3) if number % 3 != row]
        before = weights(members[number % 3].stepper)
        for found, results in zip(losses, whole.advance(active=active), strict=True):
            found += [result.loss for result in results]
        assert torch.equal(weights(members[number % 3].stepper), before)
    for found, wanted in zip(losses, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what reaches the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_all_members_are_one_call_of_each_product_and_attention() -> None:
    """A loop over members, as vmap falls back to one, would multiply these; it also warns, which is an error here."""
    counts = []
    for num_members in (2, 5):
        members = [member(Tokens(**OWN[i % 3]), seed=i) for i in range(num_members)]
        whole = bundle(members)
        with Counted() as counted:
            whole.advance()
        names = counted.names
        wanted = ("baddbmm", "bmm", "dot_product", "embedding_dense_backward", "layer_norm", "lerp_", "index_put")
        counts.append([sum(word in name for name in names) for word in wanted])
    assert counts[0] == counts[1]
    assert counts[0] == [1, 6, 2, 1, 2, 4, 0]
