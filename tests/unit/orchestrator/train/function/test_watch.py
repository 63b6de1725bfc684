"""One line more in a user's function: `orchestrator.watch` keeps its state, and probes tiers and leaves no trace."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import orchestrator
from orchestrator.control.orders import SlotOrder, Status, StopMode
from orchestrator.errors import FunctionError
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import tier_code
from orchestrator.train import checkpoint
from orchestrator.train.function.calls import Calls
from tests.unit.orchestrator.train.function.test_driver import drive, function_order
from tests.unit.orchestrator.train.links import grant

SAMPLES, BATCH = 256, 16
COARSE = Tier("fixed(k=2,bits=4)")


class Training:
    """A plain loop with dropout and batch norm; keeps what it saw.

    Args:
        watches: whether it has the line.
        epochs: of it.
        spoils_at: step whose loss is not finite while it is computed in bf16.
    """

    def __init__(self, *, watches: bool = True, epochs: int = 4, hands_over: bool = True, spoils_at: int = -1) -> None:
        self.losses: list[float] = []
        self.weights: list[Tensor] = []
        self.grads_behind: list[float] = []
        self._watches, self._epochs, self._hands_over, self._spoils_at = watches, epochs, hands_over, spoils_at
        self.model: nn.Sequential | None = None

    def __call__(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.Linear(32, 2)
        )
        self.model = model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        features = torch.randn(SAMPLES, 4)
        labels = (features.sum(1) + torch.randn(SAMPLES) > 0).long()
        data = DataLoader(TensorDataset(features, labels), batch_size=BATCH, shuffle=True)
        if self._watches:
            assert orchestrator.watch(model, optimizer if self._hands_over else None) is model
        for _ in range(orchestrator.num_reports(), self._epochs):
            for x, y in data:
                output = model(x)
                loss = nn.functional.cross_entropy(output.float(), y)
                if len(self.losses) == self._spoils_at and output.dtype is torch.bfloat16:
                    loss = loss * float("nan")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.losses.append(loss.item())
                optimizer.step()
                self.grads_behind.append(sum(float(p.grad.sum()) for p in model.parameters() if p.grad is not None))
                self.weights.append(next(model.parameters()).detach().clone())
            orchestrator.report({"loss": self.losses[-1]})


def watched_order(
    directory: Path, *, budget: float = 1.0, tiers: tuple[Tier, ...] = (Tier.FP32, Tier.BF16)
) -> SlotOrder:
    """Probes as often as they may be; calibration is declared by a budget that nothing exceeds."""
    first = function_order(directory / "runs" / "r" / "trials" / "t")
    assert first.trial is not None
    limits = replace(first.trial.limits, tiers=tiers)
    return replace(first, trial=replace(first.trial, limits=limits, probe_budget=budget, samples_per_report=10_000))


def in_tier(tier: Tier) -> Callable[[SlotOrder], SlotOrder]:
    return lambda now: replace(now, grant=grant(2, micro_batch=BATCH, tier=tier))


def alone(training: Training) -> Training:
    training()
    return training


def test_outside_of_a_trial_the_line_does_nothing() -> None:
    model = nn.Linear(1, 1)
    assert orchestrator.watch(model) is model
    assert orchestrator.watch("no model at all") == "no model at all"
    assert not model._forward_hooks
    assert orchestrator.num_reports() == 0
    assert alone(Training()).losses == alone(Training(watches=False)).losses


@pytest.mark.parametrize("hands_over", [True, False])
def test_probes_leave_no_trace(tmp_path: Path, hands_over: bool) -> None:
    training, twin = Training(hands_over=hands_over), alone(Training(watches=False))
    script, outcome = drive(watched_order(tmp_path), training)
    assert outcome.status is Status.DONE
    assert training.losses == twin.losses
    assert training.grads_behind == twin.grads_behind
    assert all(torch.equal(one, other) for one, other in zip(training.weights, twin.weights, strict=True))
    fits = {fit.tier: fit for fit in script.tiers[-1].tiers}
    assert fits[Tier.FP32].step_s is not None
    assert fits[Tier.BF16].step_s is not None, "calibrated on kept calls"
    assert training.model is not None
    assert not training.model._forward_hooks


def test_no_cheaper_tier_is_safe_before_it_was_probed(tmp_path: Path) -> None:
    script, _ = drive(watched_order(tmp_path), Training(epochs=1))
    first = script.tiers[0]
    assert {fit.tier: fit.is_safe for fit in first.tiers} == {Tier.FP32: True, Tier.BF16: False}


def test_a_tier_whose_gradients_are_as_good_is_found_safe(tmp_path: Path) -> None:
    script, outcome = drive(watched_order(tmp_path), Training(epochs=6), (10, in_tier(Tier.BF16)))
    assert outcome.status is Status.DONE
    fit = next(fit for fit in script.tiers[-1].tiers if fit.tier is Tier.BF16)
    assert fit.is_safe
    assert fit.noise_ratio is not None
    assert 0 < fit.noise_ratio < 0.01
    assert set(script.records["tier"][11:]) == {tier_code(Tier.BF16)}


def test_a_call_is_computed_again_with_the_gradients_that_the_functions_loss_gave() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(4, 3), nn.Dropout(0.3)

        def forward(self, x: dict[str, Tensor], scale: float) -> dict[str, Any]:
            hidden = self.drop(self.layer(x["input"])) * scale
            return {"loss": hidden.square().mean(), "hidden": hidden, "names": ["a"]}

    torch.manual_seed(0)
    model = Model()
    calls = Calls(model)
    calls.arm()
    own, generators = [], []
    for _ in range(2):
        generators.append(torch.get_rng_state())
        output = model({"input": torch.arange(20.0).reshape(5, 4)}, scale=2.0)
        (output["loss"] + output["hidden"].sin().mean()).backward()
        own.append([param.grad for param in model.parameters()])
        model.zero_grad()
        calls.end_step()
    for call, grads, state in zip(calls.complete, own, generators, strict=True):
        torch.set_rng_state(state)
        assert calls.replay(call) == pytest.approx(0.0, abs=1e-6)
        for param, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(param.grad, grad)
        model.zero_grad()
    calls.drop()
    assert not model._forward_hooks


def test_a_copy_of_a_model_and_a_pickle_of_it_keep_no_calls() -> None:
    model = nn.Linear(2, 2)
    calls = Calls(model)
    calls.arm()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        other(torch.ones(1, 2)).sum().backward()
        calls.end_step()
        assert torch.equal(other.weight, model.weight)
    assert calls.complete == []
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        calls.end_step()
    assert len(calls.complete) == 2


def test_a_tier_that_harms_is_left_by_what_probes_find(tmp_path: Path) -> None:
    order = watched_order(tmp_path, tiers=(Tier.FP32, Tier.BF16, COARSE))
    training = Training(epochs=6)
    script, outcome = drive(order, training, (10, in_tier(COARSE)))
    assert outcome.status is Status.DONE
    tiers = list(script.records["tier"])
    assert tier_code(COARSE) in tiers
    assert any("probe" in override.reason or "operand" in override.reason for override in script.overrides)
    assert script.overrides[-1].settings.tier is not COARSE
    assert training.model is not None
    assert {type(layer) for layer in training.model} >= {nn.Linear}, "layers are plain again"


@pytest.mark.parametrize("tier", [Tier.FP8, Tier.INT8, COARSE])
def test_linear_layers_compute_in_tiers_of_their_own_and_are_plain_again(tmp_path: Path, tier: Tier) -> None:
    kinds: list[str] = []

    def train() -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        orchestrator.watch(model)
        for _ in range(20):
            model(torch.randn(16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            kinds.append(type(model[0]).__name__)
        assert sorted(model.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
        orchestrator.report({"loss": 0.0})

    order = watched_order(tmp_path, budget=0.0, tiers=(Tier.FP32, tier))
    script, outcome = drive(
        order, train, (5, in_tier(tier)), (10, lambda now: replace(now, grant=grant(3, micro_batch=BATCH)))
    )
    assert outcome.status is Status.DONE
    assert kinds[:4] == ["Linear"] * 4
    assert set(kinds[5:9]) == {"PrecisionLinear"}
    assert set(kinds[11:]) == {"Linear"}
    assert script.dials[-1].limits.tiers == (Tier.FP32, tier)


@pytest.mark.parametrize("back_at", range(34, 39))
def test_a_tier_may_be_left_at_the_boundary_at_which_its_range_would_be_counted(tmp_path: Path, back_at: int) -> None:
    order = watched_order(tmp_path, tiers=(Tier.FP32, Tier.INT8))
    back = lambda now: replace(now, grant=grant(3, micro_batch=BATCH))  # noqa: E731
    _, outcome = drive(order, Training(epochs=3), (10, in_tier(Tier.INT8)), (back_at, back))
    assert outcome.status is Status.DONE


def test_without_the_line_only_autocasts_tiers_are_allowed(tmp_path: Path) -> None:
    order = watched_order(tmp_path, tiers=(Tier.FP32, Tier.BF16, Tier.FP8, Tier.INT8, COARSE))
    script, _ = drive(order, Training(watches=False, epochs=1))
    assert script.dials[-1].limits.tiers == (Tier.FP32, Tier.BF16)
    assert script.tiers == []


def test_weights_that_a_tier_spoils_are_put_back(tmp_path: Path) -> None:
    training = Training(epochs=6, spoils_at=60)
    order = watched_order(tmp_path)
    script, outcome = drive(order, training, (30, in_tier(Tier.BF16)))
    assert outcome.status is Status.DONE
    assert "the loss of step 60 is nan in bf16" in next(o.reason for o in script.overrides if "nan" in o.reason)
    assert torch.isfinite(training.weights[-1]).all()
    assert all(not math.isnan(loss) for number, loss in enumerate(training.losses) if number != 60)


@pytest.mark.parametrize("hands_over", [True, False])
def test_an_attempt_goes_on_with_the_state_of_its_newest_report(tmp_path: Path, hands_over: bool) -> None:
    """With a loop that asks where to begin, losses are those of an undisturbed training."""
    twin = alone(Training(watches=False))
    first = Training(hands_over=hands_over)
    stopped = lambda now: replace(now, stop=StopMode.PAUSE)  # noqa: E731
    script, outcome = drive(watched_order(tmp_path), first, (40, stopped))
    assert outcome.status is Status.INTERRUPTED
    path = script.reports[-1].checkpoint
    assert path is not None
    order = watched_order(tmp_path)
    assert order.trial is not None
    again = replace(order.trial, attempt=1, resume_from=path, num_reports_done=2)
    second = Training(hands_over=hands_over)
    script, outcome = drive(replace(order, trial=again), second)
    assert outcome.status is Status.DONE
    assert first.losses[:32] + second.losses == twin.losses
    assert torch.equal(second.weights[-1], twin.weights[-1])
    assert [(report.index, report.step) for report in script.reports] == [(2, 48), (3, 64)]


def test_a_tier_that_harmed_is_banned_in_the_next_attempt_too(tmp_path: Path) -> None:
    order = watched_order(tmp_path, tiers=(Tier.FP32, Tier.BF16, COARSE))
    script, _ = drive(order, Training(epochs=6), (10, in_tier(COARSE)))
    assert order.trial is not None
    path = Path(script.reports[-1].checkpoint or "")
    kept = checkpoint.newest_whole(path)[1].extra["guard"]
    assert kept["records"][COARSE.value]["num_bans"] > 0
    again = replace(order.trial, attempt=1, resume_from=str(path), num_reports_done=6)
    script, _ = drive(replace(order, trial=again), Training(epochs=7))
    later = checkpoint.newest_whole(Path(script.reports[-1].checkpoint or ""))[1].extra["guard"]
    assert later["records"][COARSE.value] == kept["records"][COARSE.value]


def test_the_optimizer_of_a_watched_model_need_not_step_first(tmp_path: Path) -> None:
    def train() -> None:
        torch.manual_seed(0)
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        others, own = torch.optim.Adam(first.parameters()), torch.optim.Adam(second.parameters())
        orchestrator.watch(second)
        for _ in range(4):
            second(first(torch.ones(1, 2))).sum().backward()
            others.step()
            own.step()
        counts.append(int(own.state[second.weight]["step"]))
        orchestrator.report({"loss": 0.0})

    counts: list[int] = []
    script, _ = drive(watched_order(tmp_path), train)
    order = watched_order(tmp_path)
    assert order.trial is not None
    again = replace(order.trial, attempt=1, resume_from=script.reports[-1].checkpoint, num_reports_done=1)
    drive(replace(order, trial=again), train)
    assert counts == [4, 8]


def test_a_function_without_files_of_its_own_finds_none(tmp_path: Path) -> None:
    script, _ = drive(watched_order(tmp_path), Training(epochs=1))
    order = watched_order(tmp_path)
    assert order.trial is not None
    again = replace(order.trial, attempt=1, resume_from=script.reports[-1].checkpoint, num_reports_done=1)
    found: list[Path | None] = []

    def train() -> None:
        found.append(orchestrator.checkpoint())
        orchestrator.report({"loss": 0.0})

    drive(replace(order, trial=again), train)
    assert found == [None]


def test_files_that_a_function_reports_are_kept_beside_the_watched_state(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("two")

    def train() -> None:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        orchestrator.watch(model, optimizer)
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        orchestrator.report({"loss": 1.0}, tmp_path / "mine")

    script, _ = drive(watched_order(tmp_path), train)
    path = script.reports[-1].checkpoint
    assert path is not None
    assert sorted(each.name for each in Path(path).iterdir()) == ["manifest.json", "notes", "watched.pt"]
    order = watched_order(tmp_path)
    assert order.trial is not None
    found: list[list[str]] = []

    def again() -> None:
        directory = orchestrator.checkpoint()
        assert directory is not None
        found.append([each.name for each in directory.iterdir()])
        orchestrator.report({"loss": 1.0})

    trial = replace(order.trial, attempt=1, resume_from=path, num_reports_done=1)
    drive(replace(order, trial=trial), again)
    assert found == [["notes"]]


def test_a_loader_that_is_handed_over_is_the_one_that_trains(tmp_path: Path) -> None:
    def train() -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        data = TensorDataset(torch.randn(512, 4))
        loader, other = DataLoader(data, batch_size=8), DataLoader(data, batch_size=32)
        orchestrator.watch(model, loader=loader)
        others = iter(other)
        for number, (x,) in enumerate(loader):
            (y,) = next(others) if number < 12 else (x,)
            (model(x).sum() + model(y).sum()).backward()
            optimizer.step()
        orchestrator.report({"loss": 0.0})

    script, _ = drive(function_order(tmp_path), train)
    assert script.dials[-1].start.micro_batch == 8
    assert "batch" not in script.dials[-1].off


def bad(call: Callable[[nn.Module, Any], object]) -> Callable[[], None]:
    def train() -> None:
        model = nn.Linear(2, 2)
        call(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
        orchestrator.report({"loss": 0.0})

    return train


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _model, _other: orchestrator.watch("model"), r"got a str as model; allowed: a torch.nn.Module"),
        (
            lambda model, _other: orchestrator.watch(model, "adam"),  # type: ignore[arg-type]
            r"got a str as optimizer; allowed: a torch.optim.Optimizer",
        ),
        (orchestrator.watch, r"parameters that are not those of the Linear"),
        (
            lambda model, _other: orchestrator.watch(model, None, [1, 2]),  # type: ignore[arg-type]
            r"got a list as loader; allowed: the torch.utils.data.DataLoader",
        ),
        (
            lambda model, _other: (orchestrator.watch(model), orchestrator.watch(nn.Bilinear(1, 1, 1))),
            r"a second model \(Bilinear after Linear\); allowed: one model in a function",
        ),
    ],
)
def test_what_cannot_be_watched_is_one_clear_message(
    tmp_path: Path, call: Callable[[nn.Module, Any], object], message: str
) -> None:
    with pytest.raises(FunctionError, match=message):
        drive(function_order(tmp_path), bad(call))


def test_the_same_model_may_be_handed_over_again(tmp_path: Path) -> None:
    def twice(model: nn.Module, _other: object) -> None:
        orchestrator.watch(model)
        orchestrator.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))

    _, outcome = drive(function_order(tmp_path), bad(twice))
    assert outcome.status is Status.DONE


def test_a_model_that_cannot_be_computed_again_keeps_its_tier(tmp_path: Path) -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.num_calls = nn.Linear(2, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)
            if output.dtype is torch.bfloat16:
                raise TypeError("no bf16 here")
            return output

    def train() -> None:
        model = Once()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        orchestrator.watch(model, optimizer)
        for _ in range(60):
            model(torch.randn(8, 2)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        orchestrator.report({"loss": 0.0})

    script, outcome = drive(watched_order(tmp_path), train)
    assert outcome.status is Status.DONE
    assert "its model cannot be computed again: TypeError: no bf16 here" in script.dials[-1].off["precision"]


def test_a_watched_state_of_another_model_is_one_clear_message(tmp_path: Path) -> None:
    script, _ = drive(watched_order(tmp_path), Training(epochs=1))
    path = script.reports[-1].checkpoint
    order = watched_order(tmp_path)
    assert order.trial is not None
    again = replace(order.trial, attempt=1, resume_from=path, num_reports_done=1)
    with pytest.raises(FunctionError, match="not the one whose state was kept"):
        drive(replace(order, trial=again), bad(lambda model, _: orchestrator.watch(model)))
