"""What Ray Tune is told of a trial whose metric is no number."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler

from orchestrator.control.controller import Answer
from orchestrator.control.orders import Report
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import TrialId
from orchestrator.tune.adapter import SlotTrial
from orchestrator.tune.search import _WORST


def told(value: float, worst: tuple[str, float] | None) -> dict[str, Any]:
    """The first result of a trial that reports this."""
    metrics = {"val_loss": value, "val_error": math.nan}
    report = Report(index=0, step=1, num_samples=8, metrics=metrics, checkpoint=None)
    trial = SlotTrial.__new__(SlotTrial)
    trial._id, trial._params, trial._worst = TrialId("t"), {}, worst
    trial._index, trial._is_submitted, trial._last, trial._pointer = 0, True, {}, {}
    trial._ask = lambda *_: Answer(state=TrialState.RUNNING, report=report)  # type: ignore[method-assign]
    return trial.step()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_the_worst_for_our_own_search_alone(value: float) -> None:
    ours = told(value, ("val_loss", _WORST))
    assert ours["val_loss"] == _WORST
    assert math.isnan(ours["val_error"]), "nobody compares by that"
    assert told(1.5, ("val_loss", _WORST))["val_loss"] == 1.5
    foreign = told(value, None)["val_loss"]
    assert foreign is value


@pytest.mark.parametrize("mode", ["min", "max"])
def test_successive_halving_stops_what_is_the_worst_and_lets_pass_what_is_no_number(mode: str) -> None:
    """Why it is told another value than the trial's."""
    sign = 1 if mode == "min" else -1
    decisions = []
    for last in (math.nan, sign * _WORST):
        scheduler = ASHAScheduler(metric="loss", mode=mode, max_t=8, grace_period=1, reduction_factor=2)
        for number, loss in enumerate((sign * 1.0, last)):
            trial: Any = SimpleNamespace(trial_id=str(number))
            scheduler.on_trial_add(None, trial)
            result = {"training_iteration": 1, "loss": loss}
            decision = scheduler.on_trial_result(None, trial, result)
        decisions.append(decision)
    assert decisions == [ASHAScheduler.CONTINUE, ASHAScheduler.STOP]
