"""A user's function as a trial, without Ray: its steps are seen, its dials turn, and it leaves when it is told to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import orchestrator
from orchestrator.control.orders import DialReport, Fallback, Outcome, SlotOrder, Status, StopMode
from orchestrator.errors import DamagedError, FunctionError, OutOfMemoryError, TierError
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import TIERS
from orchestrator.train.boundary import Boundary
from orchestrator.train.commit_directory import verified
from orchestrator.train.function import autocast, batch, commits
from orchestrator.train.function.driver import FunctionDriver
from tests.unit.orchestrator.train.links import ONE_RANK, FakeShare, Script, grant, order

SAMPLES, BATCH, EPOCHS = 128, 8, 3


class Training:
    """A plain loop, as people write it; keeps what it saw."""

    def __init__(self, *, data: object = None, drop_last: bool = False, accum: int = 1, schedule: bool = False) -> None:
        self.losses: list[float] = []
        self.sizes: list[int] = []
        self.rates: list[float] = []
        self.dtypes: set[torch.dtype] = set()
        self._data, self._drop_last, self._accum, self._schedule = data, drop_last, accum, schedule

    def __call__(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        model.register_forward_hook(lambda _module, _inputs, output: self.dtypes.add(output.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 48) if self._schedule else None
        features = torch.randn(SAMPLES, 4)
        labels = (features.sum(1) > 0).long()
        data: Any = self._data or TensorDataset(features, labels)
        shuffle = not isinstance(data, IterableDataset)
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            data, batch_size=BATCH, shuffle=shuffle, drop_last=self._drop_last
        )
        for _ in range(EPOCHS):
            for number, (x, y) in enumerate(loader):
                loss = nn.functional.cross_entropy(model(x).float(), y)
                loss.backward()  # type: ignore[no-untyped-call]
                self.losses.append(loss.item())
                self.sizes.append(len(x))
                if (number + 1) % self._accum == 0:
                    self.rates.append(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    optimizer.zero_grad()
                    if scheduler is not None:
                        scheduler.step()
            orchestrator.report({"loss": self.losses[-1], "note": "text"})


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples that come one after the other."""

    def __iter__(self) -> object:  # type: ignore[override]
        generator = torch.Generator().manual_seed(1)
        for _ in range(SAMPLES):
            x = torch.randn(4, generator=generator)
            yield x, (x.sum() > 0).long()


def function_order(directory: Path) -> SlotOrder:
    first = order(directory, credit=1000)
    assert first.trial is not None
    return replace(first, trial=replace(first.trial, job="mine:train", metric="loss", max_reports=1000))


def drive(
    first: SlotOrder, function: Callable[[], object], *changes: tuple[int, Callable[[SlotOrder], SlotOrder]]
) -> tuple[Script, Outcome]:
    script = Script(first)
    for num_steps, change in changes:
        script.at(num_steps, change)
    boundary = Boundary(script, 0, 1, None)
    newest = boundary.cross()
    assert newest is not None
    outcome = FunctionDriver(newest, function, ONE_RANK, boundary, script, FakeShare()).run()
    script.collect()
    return script, outcome


def alone(training: Training) -> Training:
    """The twin: the same function, by itself."""
    training()
    return training


def test_a_function_trains_as_it_does_by_itself_when_its_dials_are_held_still(tmp_path: Path) -> None:
    training = Training()
    script, outcome = drive(function_order(tmp_path), training)
    assert outcome.status is Status.DONE
    assert training.losses == alone(Training()).losses
    records = script.records
    assert [float(loss) for loss in records["loss"]] == pytest.approx(training.losses)
    assert list(records["step"]) == list(range(EPOCHS * SAMPLES // BATCH))
    assert set(records["num_samples"]) == {BATCH}
    assert [report.num_samples for report in script.reports] == [SAMPLES, 2 * SAMPLES, 3 * SAMPLES]
    assert set(script.reports[0].metrics) == {"loss"}


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batch_turns_at_the_next_batch_with_its_learning_rate_and_the_schedule_never_sees_it(
    tmp_path: Path, drop_last: bool
) -> None:
    training = Training(drop_last=drop_last)
    script, _ = drive(
        function_order(tmp_path), training, (20, lambda now: replace(now, grant=grant(2, micro_batch=16)))
    )
    assert training.sizes[:20] == [BATCH] * 20
    assert training.sizes[20:23] == [16] * 3
    assert set(training.rates) == {0.1}
    records = script.records
    assert list(records["num_samples"]) == training.sizes
    assert float(records["learning_rate"][20]) == pytest.approx(0.2)  # of SGD: with the batch
    assert [ack.generation for ack in script.acks] == [1, 2]


def test_a_users_accumulation_is_respected(tmp_path: Path) -> None:
    training = Training(accum=4)
    script, _ = drive(function_order(tmp_path), training)
    records = script.records
    assert len(records) == EPOCHS * SAMPLES // BATCH // 4
    assert set(records["grad_accum"]) == {4}
    assert set(records["num_samples"]) == {4 * BATCH}
    twin = alone(Training(accum=4))
    assert training.losses == twin.losses
    means = torch.tensor(twin.losses).reshape(-1, 4).mean(1)
    assert [float(loss) for loss in records["loss"]] == pytest.approx(means.tolist())


def fetching_ahead(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """As loops do that copy the next batch to the device while this one computes."""
    batches = iter(loader)
    ready = next(batches)
    for following in batches:
        yield ready
        ready = following
    yield ready


def small_loop(*, ahead: bool = False, evaluates: bool = False, summed: int = 1) -> Callable[[], None]:
    """Two epochs of 8 batches of 8 samples; a step for each `summed` batches, of which the losses are added up."""

    def train() -> None:
        weight = nn.Parameter(torch.ones(4, 1))
        optimizer = torch.optim.SGD([weight], lr=0.01)
        data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
        loader, others = DataLoader(data, batch_size=8), DataLoader(data, batch_size=32)
        for _ in range(2):
            losses = []
            for number, (x, y) in enumerate(fetching_ahead(loader) if ahead else loader):
                losses.append((x @ weight - y).square().mean())
                if (number + 1) % summed == 0:
                    optimizer.zero_grad()
                    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    losses = []
                if evaluates and number == 3:
                    for z, _ in others:
                        with torch.no_grad():
                            z @ weight
        orchestrator.report({"loss": 0.0})

    return train


@pytest.mark.parametrize(
    ("function", "accum"),
    [
        (small_loop(), 1),
        (small_loop(ahead=True), 1),
        (small_loop(evaluates=True), 1),
        (small_loop(ahead=True, evaluates=True), 1),
        (small_loop(summed=4), 4),
    ],
)
def test_a_step_counts_the_samples_it_was_made_of(tmp_path: Path, function: Callable[[], None], accum: int) -> None:
    script, outcome = drive(function_order(tmp_path), function)
    records = script.records
    assert outcome.num_samples == 128
    assert said(script).start.micro_batch == 8
    assert said(script).start.grad_accum == accum
    assert "batch" not in said(script).off or len(records) < batch.WATCH_STEPS
    steady = records[2:]
    assert set(steady["num_samples"]) == {8 * accum}
    assert all(records["num_samples"] <= records["micro_batch"] * records["grad_accum"])


def test_a_batch_that_was_fetched_before_it_turned_is_recorded_as_it_was(tmp_path: Path) -> None:
    script, _ = drive(
        function_order(tmp_path), small_loop(ahead=True), (9, lambda now: replace(now, grant=grant(2, micro_batch=4)))
    )
    records = script.records[9:12]
    assert list(records["num_samples"]) == [8, 4, 4]
    assert list(records["micro_batch"]) == [8, 4, 4]


def test_layers_that_a_model_keeps_in_fp32_leave_the_precision_to_the_dial(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(12):
            with torch.autocast("cpu", enabled=False):
                loss = (weight @ weight).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train, (5, lambda now: replace(now, grant=grant(2, tier=Tier.BF16))))
    assert "precision" not in said(script).off
    assert list(script.records["tier"][6:]) == [TIERS.index(Tier.BF16)] * 6


def test_what_was_computed_in_bf16_may_be_carried_over_into_fp32(tmp_path: Path) -> None:
    def train() -> None:
        layer, second = nn.Linear(2, 2), nn.LSTM(2, 2)
        first, last = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (layer, second))
        state = None
        for _ in range(16):
            made = layer(torch.ones(3, 2))
            made.float().sum().backward(retain_graph=True)
            first.step()  # the boundary, with a sample and a state of before it in hand
            output, state = second(made.detach(), state)
            state = (state[0].detach(), state[1].detach())
            output.float().sum().backward()
            last.step()
            dtypes.append(output.dtype)
        orchestrator.report({"loss": 0.0})

    dtypes: list[torch.dtype] = []
    before = torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    _, outcome = drive(
        function_order(tmp_path),
        train,
        (5, lambda now: replace(now, grant=grant(2, tier=Tier.BF16))),
        (10, lambda now: replace(now, grant=grant(3))),
    )
    assert outcome.status is Status.DONE
    assert dtypes[:4] == [torch.float32] * 4
    assert dtypes[5:9] == [torch.bfloat16] * 4
    assert dtypes[11:] == [torch.float32] * 5
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()) == before


def test_an_optimizer_that_searches_along_a_line_keeps_its_precision(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight - 2).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(6):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train, (3, lambda now: replace(now, grant=grant(2, tier=Tier.BF16))))
    assert said(script).off["precision"] == autocast.LINE_SEARCH
    assert set(script.records["tier"]) == {TIERS.index(Tier.FP32)}


def said(script: Script) -> DialReport:
    return script.dials[-1]


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        (Training(data=Stream()), batch.ITERABLE),
        (Training(schedule=True), batch.SCHEDULE),
        (Training(), ""),
    ],
)
def test_what_a_function_does_not_allow_is_off_with_its_reason(tmp_path: Path, training: Training, reason: str) -> None:
    script, _ = drive(
        function_order(tmp_path), training, (20, lambda now: replace(now, grant=grant(2, micro_batch=16)))
    )
    off = said(script).off
    assert off.get("batch", "") == reason
    assert said(script).start.micro_batch == BATCH
    limits = said(script).limits
    if reason:
        assert set(training.sizes) == {BATCH}
        assert (limits.min_global_batch, limits.max_global_batch) == (BATCH, BATCH)
    else:
        assert 16 in training.sizes
        assert limits.max_micro_batch == 64


def test_a_function_without_a_loader_says_so(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([weight])
        for _ in range(12):
            weight.square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        orchestrator.report({"loss": float(weight.detach().sum())})

    script, outcome = drive(function_order(tmp_path), train)
    assert said(script).off["batch"] == batch.NO_LOADER
    assert outcome.num_samples == 12  # a step counts as one


def test_the_tier_turns_by_autocast_at_the_next_step_and_back(tmp_path: Path) -> None:
    training = Training()
    script, _ = drive(
        function_order(tmp_path),
        training,
        (20, lambda now: replace(now, grant=grant(2, tier=Tier.BF16))),
        (30, lambda now: replace(now, grant=grant(3))),
    )
    tiers = list(script.records["tier"])
    assert set(tiers[:20]) == set(tiers[30:]) == {TIERS.index(Tier.FP32)}
    assert set(tiers[20:30]) == {TIERS.index(Tier.BF16)}
    assert training.dtypes == {torch.float32, torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")
    twin = alone(Training())
    assert training.losses[:20] == twin.losses[:20]
    assert training.losses[20:] != twin.losses[20:]
    assert training.losses == pytest.approx(twin.losses, abs=0.02)


def test_a_training_that_uses_autocast_by_itself_keeps_its_precision(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(12):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (weight @ weight).float().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train, (5, lambda now: replace(now, grant=grant(2, tier=Tier.BF16))))
    assert said(script).off["precision"] == "it uses autocast by itself"
    assert said(script).limits.tiers == (Tier.FP32,)
    assert set(script.records["tier"]) == {TIERS.index(Tier.FP32)}


def test_a_loss_that_is_not_finite_in_a_cheaper_tier_puts_the_trial_into_the_dearest(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        for number in range(20):
            loss = weight.sum() * (float("nan") if number == 9 else 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
            assert weight.grad is not None
            weight.grad.nan_to_num_()
            optimizer.step()
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train, (5, lambda now: replace(now, grant=grant(2, tier=Tier.BF16))))
    override = script.overrides[-1]
    assert override.settings.tier is Tier.FP32
    assert "the loss of step 9 is nan in bf16" in override.reason
    assert script.records["tier"][10] == TIERS.index(Tier.FP32)


def raising(where: Callable[[Tensor], object], *, reports: bool = False, raises_at: int = 9) -> Callable[[], None]:
    """Twenty steps of a linear model; `where` sees its output at one of them, and a report was made before if asked."""

    def train() -> None:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(20):
            output = model(torch.ones(4, 2))
            output.float().sum().backward()
            optimizer.step()
            if reports and number == raises_at - 1:
                orchestrator.report({"loss": 0.0})
            if number >= raises_at:
                where(output.detach())
        orchestrator.report({"loss": 0.0})

    return train


def undefined(_output: Tensor) -> object:
    return _output + undefined_name  # type: ignore[name-defined]  # noqa: F821 - a mistake, as people make it


IN_BF16 = (5, lambda now: replace(now, grant=grant(2, tier=Tier.BF16)))


@pytest.mark.parametrize("reports", [False, True])
def test_what_code_raises_because_of_a_cheaper_tier_is_not_its_mistake(tmp_path: Path, reports: bool) -> None:
    train = raising(lambda output: output.numpy(), reports=reports)
    with pytest.raises(
        TierError, match=r"^it raised in bf16: TypeError: Got unsupported ScalarType BFloat16 \("
    ) as found:
        drive(function_order(tmp_path), train, IN_BF16)
    assert isinstance(found.value.__cause__, TypeError)
    again = function_order(tmp_path)
    assert again.trial is not None
    again = replace(again, trial=replace(again.trial, attempt=1, precision_off=str(found.value)))
    script, outcome = drive(again, train, IN_BF16)
    assert outcome.status is Status.DONE
    assert said(script).off["precision"] == str(found.value)
    assert said(script).limits.tiers == (Tier.FP32,)
    assert set(script.records["tier"]) == {TIERS.index(Tier.FP32)}


def test_any_error_before_the_first_report_of_a_tier_may_come_of_it(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="NameError"):
        drive(function_order(tmp_path), raising(undefined), IN_BF16)


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ((), {}),  # it never left its tier
        ((IN_BF16,), {"reports": True}),  # a report was made in bf16 before
        ((IN_BF16,), {"raises_at": 3}),  # before the turn
    ],
)
def test_a_mistake_of_the_functions_own_is_told_at_once(tmp_path: Path, changes: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(NameError, match="undefined_name"):
        drive(function_order(tmp_path), raising(undefined, **asked), *changes)


def test_memory_that_ran_out_with_a_larger_batch_sends_it_back_to_its_own(tmp_path: Path) -> None:
    def train() -> None:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for (x,) in DataLoader(TensorDataset(torch.randn(512, 4)), batch_size=8):
            if len(x) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            model(x).sum().backward()
            optimizer.step()
        orchestrator.report({"loss": 0.0})

    def at(generation: int, size: int) -> Callable[[SlotOrder], SlotOrder]:
        return lambda now: replace(now, grant=grant(generation, micro_batch=size))

    with pytest.raises(OutOfMemoryError, match="with a batch of 32, where its own is 8: CUDA out of memory") as found:
        drive(function_order(tmp_path), train, (12, at(2, 16)), (20, at(3, 32)))
    assert found.value.settings is not None
    assert found.value.settings.micro_batch == 8


def test_a_report_without_the_metric_and_memory_that_ran_out_are_not_blamed_on_a_tier(tmp_path: Path) -> None:
    def full(_output: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        drive(function_order(tmp_path / "a"), raising(full), IN_BF16)
    with pytest.raises(FunctionError, match="not among"):
        drive(function_order(tmp_path / "b"), raising(lambda _: orchestrator.report({})), IN_BF16)


def test_weights_that_a_cheaper_tier_spoilt_are_those_of_the_newest_checkpoint_again(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for number in range(20):
            loss = weight.sum() * (float("nan") if number == 9 else 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen.append(number)
        orchestrator.report({"loss": 0.0})

    seen: list[int] = []
    with pytest.raises(TierError, match="not finite in a cheaper tier, nor in fp32 behind it"):
        drive(function_order(tmp_path), train, IN_BF16)
    assert seen[-1] == 11, "it does not train on with what is lost"
    seen.clear()
    _, outcome = drive(function_order(tmp_path), train)  # its own tier: not finite by itself
    assert outcome.status is Status.DONE
    assert len(seen) == 20


def test_a_report_that_is_not_finite_in_a_cheaper_tier_puts_the_trial_into_the_dearest(tmp_path: Path) -> None:
    train = raising(lambda _: orchestrator.report({"loss": float("nan")}))
    script, outcome = drive(function_order(tmp_path), train, IN_BF16)
    assert outcome.status is Status.DONE
    assert "loss was reported as nan in bf16: goes on in fp32" in script.overrides[-1].reason
    assert script.records["tier"][11] == TIERS.index(Tier.FP32)


def test_several_optimizers_are_one_step_and_all_learning_rates_follow(tmp_path: Path) -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    moves: list[tuple[float, float]] = []

    def train() -> None:
        data = TensorDataset(torch.ones(SAMPLES, 1))
        optimizers = [torch.optim.SGD([weight], lr=0.25) for weight in (first, second)]
        for _ in range(2):
            for (x,) in DataLoader(data, batch_size=BATCH):
                before = first.item(), second.item()
                for weight, optimizer in zip((first, second), optimizers, strict=True):
                    optimizer.zero_grad()
                    (weight * x.mean()).sum().backward()
                    optimizer.step()
                moves.append((before[0] - first.item(), before[1] - second.item()))
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train, (12, lambda now: replace(now, grant=grant(2, micro_batch=16))))
    assert len(script.records) == len(moves)
    assert moves[2] == (0.25, 0.25)
    assert moves[14] == (0.5, 0.5)
    # A loader that is made anew for the second epoch follows from its second batch on.
    assert list(script.records["num_samples"]) == [BATCH] * 12 + [16] * 2 + [BATCH] + [16] * 7 + [BATCH]


def test_a_function_that_is_told_to_leave_leaves_at_the_next_boundary(tmp_path: Path) -> None:
    seen: list[str] = []

    def train() -> None:
        try:
            Training()()
        except Exception:
            seen.append("caught")
        finally:
            seen.append("cleaned up")

    script, outcome = drive(function_order(tmp_path), train, (10, lambda now: replace(now, stop=StopMode.DISCARD)))
    assert outcome.status is Status.STOPPED
    assert outcome.step == 10
    assert seen == ["cleaned up"]
    assert len(script.records) == 10


def test_a_function_that_swallows_everything_leaves_all_the_same(tmp_path: Path) -> None:
    def train() -> None:
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(30):
            try:
                weight.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            except BaseException:
                logging.getLogger("mine").info("went on")

    _, outcome = drive(function_order(tmp_path), train, (10, lambda now: replace(now, stop=StopMode.DISCARD)))
    assert outcome.status is Status.STOPPED


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"other": 1.0}, r"'loss' is not among the reported values \(other\)"),
        ({"loss": "low"}, "was reported as a str; allowed: a number"),
        ({}, r"not among the reported values \(nothing\)"),
    ],
)
def test_a_report_without_the_metric_is_one_clear_error(
    tmp_path: Path, metrics: dict[str, object], message: str
) -> None:
    with pytest.raises(FunctionError, match=message):
        drive(function_order(tmp_path), lambda: orchestrator.report(metrics))


def test_a_function_that_never_reports_is_an_error_and_after_a_report_it_is_done(tmp_path: Path) -> None:
    with pytest.raises(FunctionError, match="returned without a report of 'loss'"):
        drive(function_order(tmp_path / "a"), lambda: None)
    _, outcome = drive(function_order(tmp_path / "b"), lambda: orchestrator.report({"loss": torch.tensor(1.0)}))
    assert outcome.status is Status.DONE


def test_an_error_of_the_function_is_its_own(tmp_path: Path) -> None:
    def train() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        drive(function_order(tmp_path), train)


def test_the_number_of_reports_is_kept_to(tmp_path: Path) -> None:
    first = function_order(tmp_path)
    assert first.trial is not None
    first = replace(first, trial=replace(first.trial, max_reports=2))
    script, outcome = drive(first, Training())
    assert outcome.status is Status.DONE
    assert len(script.reports) == 2


def test_it_goes_on_from_the_checkpoint_that_it_reported(tmp_path: Path) -> None:
    def train() -> None:
        path = orchestrator.checkpoint()
        begin = 0 if path is None else int((path / "sub" / "epoch").read_text())
        seen.append(begin)
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for epoch in range(begin, 4):
            for _ in range(5):
                weight.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            (tmp_path / "mine" / "sub").mkdir(parents=True, exist_ok=True)
            (tmp_path / "mine" / "sub" / "epoch").write_text(str(epoch + 1))
            orchestrator.report({"loss": 1.0}, tmp_path / "mine")

    seen: list[int] = []
    stopped = lambda now: replace(now, stop=StopMode.CHECKPOINT)  # noqa: E731
    script, outcome = drive(function_order(tmp_path / "t"), train, (12, stopped))
    assert outcome.status is Status.INTERRUPTED
    assert [report.step for report in script.reports] == [5, 10]
    path = script.reports[-1].checkpoint
    assert path is not None
    assert verified(Path(path)).extra["num_reports"] == 2
    first = function_order(tmp_path / "t")
    assert first.trial is not None
    again = replace(first.trial, attempt=1, resume_from=path, num_reports_done=2)
    script, outcome = drive(replace(first, trial=again), train)
    assert outcome.status is Status.DONE
    assert seen == [0, 2]
    assert [(report.index, report.step) for report in script.reports] == [(2, 15), (3, 20)]
    assert script.records["step"][0] == 10


def test_where_its_newest_checkpoint_is_damaged_it_goes_on_from_the_one_before(tmp_path: Path) -> None:
    def train() -> None:
        path = orchestrator.checkpoint()
        begin = 0 if path is None else int((path / "epoch").read_text())
        seen.append(begin)
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        (tmp_path / "mine").mkdir(exist_ok=True)
        for epoch in range(begin, 3):
            for _ in range(5):
                weight.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            (tmp_path / "mine" / "epoch").write_text(str(epoch + 1))
            orchestrator.report({"loss": 1.0}, tmp_path / "mine")

    seen: list[int] = []
    script, _ = drive(function_order(tmp_path / "t"), train)
    path = script.reports[-1].checkpoint
    assert path is not None
    (Path(path) / "epoch").write_text("9")
    first = function_order(tmp_path / "t")
    assert first.trial is not None
    again = replace(first.trial, attempt=1, resume_from=path, num_reports_done=3)
    script, outcome = drive(replace(first, trial=again), train)
    assert outcome.status is Status.DONE
    assert seen == [0, 2]
    assert script.records["step"][0] == 10
    assert script.reports == [], "the third report was taken already"
    assert script.fallbacks == [Fallback(checkpoint=path, step=10, num_steps=5)]
    for commit in (tmp_path / "t" / "checkpoints").glob("step-*"):
        (commit / "epoch").write_text("9")
    with pytest.raises(DamagedError, match="step-15"):
        drive(replace(first, trial=again), train)


def test_a_checkpoint_may_be_one_file(tmp_path: Path) -> None:
    source = tmp_path / "epoch=1.ckpt"
    source.write_text("state")
    path = commits.commit(tmp_path / "checkpoints", source, {"step": 5})
    taken = commits.take_out(path, tmp_path / "resumed")
    assert [(file.name, file.read_text()) for file in taken.iterdir()] == [("epoch=1.ckpt", "state")]
    assert verified(path).extra == {"step": 5}


def test_without_a_checkpoint_it_begins_anew_and_repeats_no_report(tmp_path: Path) -> None:
    first = function_order(tmp_path)
    assert first.trial is not None
    again = replace(first.trial, attempt=1, num_reports_done=2)
    script, _ = drive(replace(first, trial=again), Training())
    assert [report.index for report in script.reports] == [2]
    assert script.records["step"][0] == 0


def test_relative_paths_land_in_the_trials_own_directory(tmp_path: Path) -> None:
    before = Path.cwd()

    def train() -> None:
        Path("notes.txt").write_text("mine")
        info = orchestrator.trial()
        assert info is not None
        assert (info.trial_id, info.rank, info.world_size, info.directory) == ("t", 0, 1, tmp_path / "runs" / "t")
        orchestrator.report({"loss": 1.0})

    drive(function_order(tmp_path / "runs" / "t"), train)
    assert (tmp_path / "runs" / "t" / "work" / "notes.txt").read_text() == "mine"
    assert Path.cwd() == before


def test_outside_of_a_trial_the_calls_do_nothing() -> None:
    assert orchestrator.trial() is None
    assert orchestrator.checkpoint() is None
    orchestrator.report({"loss": 1.0})
    Training()()


@pytest.mark.parametrize(("accum", "clip"), [(1, None), (4, None), (4, 1e-3)])
def test_the_noise_scale_is_estimated_where_the_batch_may_turn(tmp_path: Path, accum: int, clip: float | None) -> None:
    """Gradients of a known noise: of a weight w with loss mean(w x), the gradient is the mean of x."""
    spread, mean = 3.0, 0.5
    data = TensorDataset(mean + spread * torch.randn(8192, 4, generator=torch.Generator().manual_seed(0)))

    def train() -> None:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=1e-6)
        for _ in range(2):
            for number, (x,) in enumerate(DataLoader(data, batch_size=BATCH, shuffle=True)):
                ((x @ weight).mean() / accum).backward()
                if (number + 1) % accum == 0:
                    if clip is not None:
                        nn.utils.clip_grad_norm_([weight], clip)
                    optimizer.step()
                    optimizer.zero_grad()
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train)
    records = script.records
    seen = records[~np.isnan(records["noise_trace"])]
    if accum == 1:
        assert list(seen["step"][:22]) == [*range(21, 105, 4), 133]
    else:
        assert list(seen["step"][:21]) == [*range(20, 104, 4)]
    assert float(seen["noise_trace"].mean()) == pytest.approx(4 * spread**2, rel=0.2)
    assert float(seen["grad_sq"].mean()) == pytest.approx(4 * mean**2, abs=1.0)


def test_no_gradient_is_copied_where_the_batch_cannot_turn(tmp_path: Path) -> None:
    script, _ = drive(function_order(tmp_path), Training(schedule=True))
    assert np.isnan(script.records["noise_trace"]).all()
