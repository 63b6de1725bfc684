"""Trainings that people declare: they train as plain PyTorch does, and what their models do is allowed."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn
from torch.utils.data import DataLoader

from orchestrator.control.orders import Status, StopMode
from orchestrator.jobs.data import SampleCursor
from orchestrator.jobs.own import UserCodeError
from orchestrator.jobs.training import Training
from orchestrator.policies.tier import Tier
from orchestrator.train.batch.meter import FIRST_STEP
from orchestrator.train.step_mode.choice import StepMode
from tests.unit.orchestrator.train.declared import (
    Augmented,
    BatchNormed,
    Gan,
    LstmLbfgs,
    PaddedText,
    Pictures,
    Plateau,
    Sampled,
    Streamed,
    TwoGroups,
    Unrandom,
    declared_order,
    plainly,
    stepper,
)
from tests.unit.orchestrator.train.links import ONE_RANK, Script, grant, loop
from tests.unit.orchestrator.train.step_mode.recorders import CallAgain

REPLAYED = replace(ONE_RANK, step_mode=StepMode.GRAPH, recorder=CallAgain)


class FusedDicts(Unrandom):
    def build_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), fused=True)


class FusedText(PaddedText):
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5, fused=True)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_loader_a_cosine_and_two_groups_train_as_in_plain_pytorch(tmp_path: Path, grad_accum: int) -> None:
    one = stepper(tmp_path, Unrandom(), micro_batch=8 // grad_accum, grad_accum=grad_accum)
    found = [one.step() for _ in range(40)]
    wanted, model = plainly(Unrandom(), 40)
    assert [result.loss for result in found] == pytest.approx(wanted, rel=1e-5)
    assert max(result.grad_norm for result in found) > 1, "clipping to 1 would have shown"
    for mine, theirs in zip(one.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_with_one_micro_batch_even_dropout_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    one = stepper(tmp_path, TwoGroups())
    found = [one.step().loss for _ in range(FIRST_STEP)]  # later ones are cut in two now and then, for their noise
    assert found == pytest.approx(plainly(TwoGroups(), FIRST_STEP)[0], rel=1e-5)


def test_batch_norm_trains_as_in_plain_pytorch_and_its_micro_batches_are_never_cut(tmp_path: Path) -> None:
    one = stepper(tmp_path, BatchNormed())
    found = [one.step() for _ in range(60)]
    wanted, model = plainly(BatchNormed(), 60, per_epoch=True)
    assert [result.loss for result in found] == pytest.approx(wanted, rel=1e-5)
    for name, theirs in model.named_buffers():
        torch.testing.assert_close(one.model.get_buffer(name), theirs, rtol=1e-4, atol=1e-5)
    assert all(result.noise is None for result in found), "there is one micro-batch, and it is not halved"


def test_the_noise_of_batch_norm_is_measured_between_whole_micro_batches(tmp_path: Path) -> None:
    sizes = []

    class Watched(BatchNormed):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            sizes.append(len(batch[0]))
            return super().loss(model, batch)

    one = stepper(tmp_path, Watched(), micro_batch=4, grad_accum=2)
    assert any(one.step().noise is not None for _ in range(FIRST_STEP + 8))
    assert set(sizes) == {4}
    (first, second), half = one.probe_halves()
    assert (len(first[0]), len(second[0]), half) == (4, 4, 4)


def test_tied_weights_and_padded_text_train_as_in_plain_pytorch(tmp_path: Path) -> None:
    one = stepper(tmp_path, PaddedText())
    assert [one.step().loss for _ in range(40)] == pytest.approx(plainly(PaddedText(), 40)[0], rel=1e-5)
    assert one.model.head.weight is one.model.embedding.weight  # type: ignore[union-attr]


def test_padded_text_gives_the_same_gradient_however_it_is_cut(tmp_path: Path) -> None:
    whole, cut = (stepper(tmp_path, PaddedText(), micro_batch=16 // n, grad_accum=n) for n in (1, 4))
    for _ in range(40):
        one, other = whole.step(), cut.step()
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (one.noise is None) == (other.noise is None)
    assert whole.noise.mean.count == cut.noise.mean.count > 0


def test_an_lstm_is_trained_by_lbfgs_as_in_plain_pytorch(tmp_path: Path) -> None:
    one = stepper(tmp_path, LstmLbfgs(), micro_batch=16)
    wanted, _ = plainly(LstmLbfgs(), 12, batch=16, closure=True)
    assert [one.step().loss for _ in range(12)] == pytest.approx(wanted, rel=1e-4)


def test_two_optimizers_train_in_a_step_of_the_trainings_own(tmp_path: Path) -> None:
    training = Gan()
    one = stepper(tmp_path, training, micro_batch=4, grad_accum=2)
    found = [one.step() for _ in range(20)]
    torch.manual_seed(3)
    model = training.build_model()
    optimizers, (scheduler,) = training.build_optimizer(model)
    torch.manual_seed(3)
    cursor, wanted, data = SampleCursor(seed=3, num_samples=96), [], training.train_data()
    for _ in range(20):
        indices, cursor = cursor.take(8)
        batch = torch.utils.data.default_collate([data[index] for index in indices.tolist()])
        wanted.append(float(training.train_step(model, batch, *optimizers).detach()))
        scheduler.step()
    assert [result.loss for result in found] == pytest.approx(wanted, rel=1e-5)


def run_to_end(directory: Path, training: Any, *, stop_at: int | None = None) -> list[float]:
    """Losses of a whole trial; stopped after some steps and begun again by a new object, where asked for."""
    first = declared_order(directory, training)
    script = Script(first)
    torch.manual_seed(3)
    if stop_at is None:
        assert loop(script, training).run().status is Status.DONE
        return list(script.records["loss"])
    script.at(stop_at, lambda now: replace(now, stop=StopMode.CHECKPOINT))
    outcome = loop(script, training).run()
    assert outcome.status is Status.INTERRUPTED
    assert first.trial is not None
    again = replace(first, trial=replace(first.trial, attempt=1, resume_from=outcome.checkpoint))
    rest = Script(again)
    torch.manual_seed(77)
    assert loop(rest, type(training)()).run().status is Status.DONE
    return [*script.records["loss"], *rest.records["loss"]]


@pytest.mark.parametrize("kind", [TwoGroups, Augmented, PaddedText, LstmLbfgs, Gan, Plateau, Streamed, Sampled])
def test_a_trial_that_is_stopped_within_an_epoch_goes_on_bit_equal(tmp_path: Path, kind: type) -> None:
    undisturbed = run_to_end(tmp_path / "a", kind())
    assert len(undisturbed) == 40
    assert run_to_end(tmp_path / "b", kind(), stop_at=17) == undisturbed


def test_state_of_any_kind_comes_back_with_a_checkpoint(tmp_path: Path) -> None:
    training = Augmented()
    one = stepper(tmp_path, training)
    for _ in range(5):
        one.step()
    path = one.commit(tmp_path / "checkpoints", {"num_reports": 0})
    again = Augmented()
    stepper(tmp_path, again).resume(path)
    assert again.num_seen == 5


def test_state_that_cannot_be_pickled_is_refused_by_name(tmp_path: Path) -> None:
    class Unpicklable(Augmented):
        def state_dict(self) -> dict[str, Any]:
            return {"function": lambda: None}

    with pytest.raises(Exception, match="state of the training cannot be pickled"):
        stepper(tmp_path, Unpicklable()).commit(tmp_path / "checkpoints", {"num_reports": 0})


def test_random_samples_depend_on_seed_epoch_and_number_only(tmp_path: Path) -> None:
    training = Training(Augmented())
    training.open(3)
    cpu = torch.device("cpu")
    together, _ = training.batch([5, 6, 5 + 96], cpu)
    before = torch.get_rng_state()
    assert torch.equal(training.batch([6], cpu)[0][0], together[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(together[0], together[2]), "another epoch"
    training.open(4)
    assert not torch.equal(training.batch([5], cpu)[0][0], together[0]), "another seed"


def test_loader_processes_read_the_same_samples(tmp_path: Path) -> None:
    class Loaded(Augmented):
        def train_data(self) -> Any:
            return DataLoader(Pictures(augments=True), batch_size=8, shuffle=True, num_workers=1)

    here, there = Training(Augmented()), Training(Loaded())
    for training in (here, there):
        training.open(3)
    try:
        cpu, numbers = torch.device("cpu"), [3, 90, 96 + 3]
        assert torch.equal(there.batch(numbers, cpu)[0], here.batch(numbers, cpu)[0])
    finally:
        there.close()


def test_a_data_set_that_cannot_be_sent_is_read_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Local(BatchNormed):
        def train_data(self) -> Any:
            data = Pictures()
            data.transform = lambda picture: picture  # type: ignore[attr-defined]
            return DataLoader(data, num_workers=2)

    training = Training(Local())
    with caplog.at_level(logging.WARNING):
        training.open(0)
    assert "cannot be pickled" in caplog.text
    assert len(training.batch([0, 1], torch.device("cpu"))[0]) == 2


def test_a_stream_shows_each_sample_of_each_epoch_once_whatever_the_batch(tmp_path: Path) -> None:
    training = Streamed()
    one = stepper(tmp_path, training)
    for batch in (8, 4, 12, 8, 8, 20, 8):
        one.turn(replace(one.settings, micro_batch=batch))
        one.step()
        one.probe_batch(3)
    assert training.shown == list(itertools.islice(itertools.cycle(map(float, range(20))), 68))
    assert one.job.own.shown is training.shown


def test_a_sampler_of_ones_own_says_the_order(tmp_path: Path) -> None:
    training = Sampled()
    one = stepper(tmp_path, training, micro_batch=10)
    for _ in range(6):
        one.step()
    first, second = training.shown[:30], training.shown[30:]
    assert first != second
    assert sum(number >= 10 for number in first) > 15, "drawn by their weights"
    again = Sampled()
    other = stepper(tmp_path, again, micro_batch=5)
    for _ in range(12):
        other.step()
    assert again.shown == training.shown


class Recordable(BatchNormed):
    """BatchNorm, a fused optimizer, tuples of tensors, a schedule by steps; one sample is broken when first read."""

    scheduler_interval = "step"

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def train_data(self) -> Any:
        return Breaking(self.broken)

    def build_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)


class Breaking(Pictures):
    def __init__(self, broken: int | None) -> None:
        super().__init__()
        self.broken = broken

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture, label = super().__getitem__(index)
        if index == self.broken:
            self.broken = None
            return picture * float("nan"), label
        return picture, label


def test_steps_of_a_mean_loss_are_replayed_and_leave_running_means_and_schedules_alone(tmp_path: Path) -> None:
    wanted, eager = [], stepper(tmp_path, Recordable())
    for _ in range(40):
        wanted += eager.advance()
    one = stepper(tmp_path, Recordable(), ranks=REPLAYED)
    found = [result for _ in range(40) for result in one.advance()] + one.settle()
    assert {result.mode for result in found[1:]} == {StepMode.GRAPH}
    assert [result.loss for result in found] == pytest.approx([result.loss for result in wanted], rel=1e-5)
    assert [r.learning_rate for r in found] == [r.learning_rate for r in wanted]
    for name, buffer in eager.model.named_buffers():
        if "mean" not in name:  # Adam moves a bias before a BatchNorm by rounding alone, and with it the mean
            torch.testing.assert_close(one.model.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


def test_a_replayed_step_that_was_skipped_takes_the_schedule_back(tmp_path: Path) -> None:
    one = stepper(tmp_path, Recordable(), ranks=REPLAYED)
    indices, _ = one.cursor.take(96)
    one = stepper(tmp_path, Recordable(int(indices[85])), ranks=REPLAYED)
    found = [result for _ in range(20) for result in one.advance()] + one.settle()
    assert [result.step for result in found if result.is_skipped] == [10]
    done = [result for result in found if not result.is_skipped]
    assert [result.step for result in done] == list(range(len(done)))
    eager = stepper(tmp_path, Recordable())
    assert [r.learning_rate for r in done] == [eager.step().learning_rate for _ in done]
    assert one.optimizers.bases == eager.optimizers.bases


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (PaddedText, "SGD is not fused"),
        (Unrandom, "AdamW is not fused"),
        (FusedDicts, "its batches are no tuples of tensors"),
        (FusedText, "the number of loss elements is known only with the batch"),
    ],
)
def test_what_cannot_be_replayed_is_done_eagerly_and_says_why(tmp_path: Path, kind: Any, reason: str) -> None:
    one = stepper(tmp_path, kind(), ranks=REPLAYED)
    assert {result.mode for _ in range(4) for result in one.advance()} == {StepMode.EAGER}
    assert reason in one.mode_words


def test_the_batch_multiplies_what_the_schedule_says_and_a_schedule_counts_samples(tmp_path: Path) -> None:
    one = stepper(tmp_path, TwoGroups())
    still = stepper(tmp_path, TwoGroups())
    for _ in range(10):
        one.step()
    one.turn(replace(one.settings, micro_batch=2))
    for _ in range(20):
        result = one.step()
    for _ in range(15):
        still.step()
    assert one.cursor.position == still.cursor.position == 120
    assert one.optimizers.bases == pytest.approx(still.optimizers.bases)
    one.step()
    groups = [group["lr"] for group in one.optimizer.param_groups]
    assert groups == pytest.approx([base / 2 for base in one.optimizers.bases]), (
        "a quarter of the batch, by square root"
    )
    assert groups[0] != groups[1]
    assert result.learning_rate < still.step().learning_rate


def test_a_scheduler_that_follows_the_metric_is_told_it(tmp_path: Path) -> None:
    one = stepper(tmp_path, Plateau())
    for _ in range(3):
        one.step()
        one.evaluate()
    assert one.optimizers.bases == [1e-2 / 8], "a threshold that nothing meets"
    assert one.job.own.average is not None


def test_clipping_by_value_is_torchs(tmp_path: Path) -> None:
    one = stepper(tmp_path, Plateau())
    weights = [param.detach().clone() for param in one.model.parameters()]
    result = one.step()
    assert result.grad_norm > 0.1, "the norm is that before"
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    for param, value in zip(model.parameters(), weights, strict=True):
        param.data.copy_(value)
    torch.manual_seed(3)
    indices, _ = SampleCursor(seed=3, num_samples=96).take(8)
    data = Plateau().train_data().dataset
    batch = torch.utils.data.default_collate([data[index] for index in indices.tolist()])
    Plateau().loss(model, batch).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    torch.optim.RMSprop(model.parameters(), lr=1e-2).step()
    for mine, theirs in zip(one.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_batch_norm_limits_the_batch_dial_to_whole_micro_batches(tmp_path: Path) -> None:
    first = declared_order(tmp_path, BatchNormed())
    script = Script(first)
    script.at(5, lambda now: replace(now, grant=grant(2, micro_batch=8, grad_accum=2)))
    assert loop(script, BatchNormed()).run().status is Status.DONE
    script.collect()
    (said,) = script.dials
    assert (said.limits.min_micro_batch, said.limits.max_micro_batch) == (8, 8)
    assert said.off == {}
    assert {int(n) for n in script.records["grad_accum"]} == {1, 2}


def test_a_step_of_ones_own_has_neither_batch_nor_tier_as_dials_and_says_why(tmp_path: Path) -> None:
    script = Script(declared_order(tmp_path, Gan()))
    assert loop(script, Gan()).run().status is Status.DONE
    script.collect()
    (said,) = script.dials
    assert said.off == {
        "batch": "train_step takes a batch as it is",
        "precision": "train_step computes its gradients itself",
    }
    assert said.limits.tiers == (Tier.FP32,)
    assert (said.limits.min_global_batch, said.limits.max_global_batch) == (8, 8)


def test_the_default_evaluation_is_the_mean_loss_of_the_held_out_samples(tmp_path: Path) -> None:
    one = stepper(tmp_path, TwoGroups())
    one.model.eval()
    data = TwoGroups().eval_data()
    wanted = 30 * F.cross_entropy(one.model(data.x), data.y).detach()
    assert one.evaluate() == {"val_loss": pytest.approx(float(wanted), rel=1e-5)}


class Wrong(TwoGroups):
    """One part at a time returns what it should not."""

    metric = "val_loss"

    def __init__(self, part: str, value: Any) -> None:
        self.part = part
        setattr(self, part, (lambda *_: value) if callable(getattr(self, part)) else value)

    def evaluate(self, model: nn.Module) -> Any:
        return {"val_loss": 1.0}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("build_model", None, "Wrong.build_model returned None; allowed: an nn.Module"),
        ("train_data", 3, "Wrong.train_data() returned int; allowed: a Dataset"),
        ("train_data", [], "Wrong.train_data() returned list without samples"),
        ("loss", None, "Wrong.loss returned None; allowed: the mean loss"),
        ("loss", torch.zeros(3), "Wrong.loss returned a tensor of shape (3,); allowed: the mean"),
        ("build_optimizer", "adam", "Wrong.build_optimizer returned a str; allowed: an optimizer"),
        ("build_optimizer", torch.optim.SGD([torch.zeros(1)]), "parameters that are not the model's"),
        ("evaluate", 0.5, "Wrong.evaluate returned a float; allowed: a dict"),
        ("evaluate", {"val_loss": "low"}, "Wrong.evaluate returned a dict with val_loss: str"),
        (
            "evaluate",
            {"valloss": 1.0},
            "no metric 'val_loss', which the search looks at; evaluate returned: valloss. Did",
        ),
    ],
)
def test_a_part_that_returns_what_it_should_not_is_named(
    tmp_path: Path, part: str, value: object, message: str
) -> None:
    def train() -> None:
        one = stepper(tmp_path, Wrong(part, value))
        one.step()
        one.evaluate()

    with pytest.raises(UserCodeError) as caught:
        train()
    assert message in str(caught.value)


def test_a_wrong_attribute_is_named(tmp_path: Path) -> None:
    class Clipped(TwoGroups):
        clip_norm = "much"

    with pytest.raises(UserCodeError, match=r"Clipped.clip_norm is 'much'; allowed: a number >= 0, or None"):
        Training(Clipped())


def test_missing_parts_are_all_named_at_once(tmp_path: Path) -> None:
    class Half:
        def model(self) -> None: ...

    with pytest.raises(UserCodeError, match=r"Half has no build_model.*\(it has model\(\)\); no train_data.*no loss"):
        Training(Half())
