"""Runs a training of this folder under the driver of functions, in a process of its own and without a Ray cluster.

Its orders are scripted. Records what `losses.py` records, and what the driver told:

    python -m tests.foreign.driven gan OUT.json '{"params": {...}, "turns": {"20": {"tier": "bf16"}}}'

`turns` sets dials when that many steps were made, `stop_at` ends the attempt with a checkpoint there, `attempt`,
`resume_from` and `num_reports_done` begin a later one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.control.orders import Outcome, SlotOrder, StopMode
from orchestrator.jobs.own import call_function
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train.boundary import Boundary
from orchestrator.train.function import reports
from orchestrator.train.function.driver import FunctionDriver
from tests.foreign.losses import Recorded, StepLosses, finish_process, recorded, start_process
from tests.foreign.trainings import BY_NAME, ForeignTraining, in_ray_train
from tests.unit.orchestrator.train.links import ONE_RANK, FakeShare, Script, grant, order

MANY = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """What one attempt did and told.

    `steps` are those of `losses.py`; `records` the driver's own, column by column; `reports` have their index, step,
    number of samples, metrics and checkpoint; `off` gives the reasons of dials that are off; `limits` and `start` are
    those last told; `overrides` are the reasons of protective moves; `source` are the lines of the module that trained.
    """

    steps: list[StepLosses]
    records: dict[str, list[Any]]
    reports: list[dict[str, Any]]
    off: dict[str, str]
    limits: dict[str, Any]
    start: dict[str, Any]
    overrides: list[str]
    status: str
    step: int
    source: list[str]
    output: str = ""

    @property
    def checkpoint(self) -> str | None:
        """The newest commit that a report named."""
        return next((each["checkpoint"] for each in reversed(self.reports) if each["checkpoint"]), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the attempt is asked for; see the module."""

    params: Mapping[str, Any]
    metric: str
    turns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stop_at: int | None = None
    attempt: int = 0
    resume_from: str | None = None
    num_reports_done: int = 0
    max_reports: int = MANY


def run_driven(training: ForeignTraining, directory: Path, **asked: Any) -> Driven:
    """A training under the driver, in a process of its own whose trial directory is `directory / "trials" / "t"`.

    Args:
        training: which one.
        directory: of the run; what the training writes to relative paths lands in the trial's directory below it.
        asked: fields of `Orders`; its parameters are those of the table if none are given.
    """
    values = {"params": dict(training.params), "metric": training.metric, **asked}
    command = ["-m", "tests.foreign.driven", training.name, str(directory / "driven.json"), json.dumps(values)]
    output = finish_process(start_process(command, directory), directory)
    read = json.loads((directory / "driven.json").read_text())
    steps = [StepLosses(optimizer=which, losses=tuple(losses)) for which, losses in read.pop("steps")]
    return Driven(steps=steps, output=output, **read)


def _order(training: ForeignTraining, asked: Orders, directory: Path) -> SlotOrder:
    first = order(directory / "trials" / "t", credit=MANY)
    assert first.trial is not None
    limits = replace(first.trial.limits, min_global_batch=1, max_global_batch=4096, max_micro_batch=4096)
    trial = replace(
        first.trial,
        job=training.import_path,
        params=dict(asked.params),
        limits=limits,
        metric=asked.metric,
        max_reports=asked.max_reports,
        attempt=asked.attempt,
        resume_from=asked.resume_from,
        num_reports_done=asked.num_reports_done,
    )
    return replace(first, trial=trial)


def _turn(generation: int, dials: Mapping[str, Any], now: SlotOrder) -> SlotOrder:
    assert now.grant is not None
    changes = {**asdict(now.grant.settings), **dials}
    changes["tier"] = Tier(changes["tier"])
    granted: Settings = replace(now.grant.settings, **changes)
    return replace(now, grant=replace(grant(generation), settings=granted))


def _drive(script: Script, function: Callable[[], object]) -> Outcome:
    boundary = Boundary(script, 0, 1, None)
    newest = boundary.cross()
    assert newest is not None
    outcome = FunctionDriver(newest, function, ONE_RANK, boundary, script, FakeShare()).run()
    script.collect()
    return outcome


def _told(script: Script, seen: Recorded, outcome: Outcome) -> dict[str, Any]:
    records, last = script.records, script.dials[-1]
    return {
        "steps": [(step.optimizer, step.losses) for step in seen.steps],
        "records": {str(name): records[name].tolist() for name in records.dtype.names or ()},
        "reports": [asdict(report) for report in script.reports],
        "off": last.off,
        "limits": asdict(last.limits),
        "start": asdict(last.start),
        "overrides": [override.reason for override in script.overrides],
        "status": outcome.status.value,
        "step": outcome.step,
    }


def main() -> None:
    """Run one attempt and write what it did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("name", choices=sorted(BY_NAME))
    parser.add_argument("output", type=Path)
    parser.add_argument("orders", type=json.loads)
    arguments = parser.parse_args()
    training, asked = BY_NAME[arguments.name], Orders(**arguments.orders)
    reports.install()
    script = Script(_order(training, asked, arguments.output.parent))
    for number, (step, dials) in enumerate(asked.turns.items()):
        script.at(int(step), partial(_turn, 2 + number, dials))
    if asked.stop_at is not None:
        script.at(asked.stop_at, lambda now: replace(now, stop=StopMode.CHECKPOINT))
    ended: list[Outcome] = []
    function = partial(call_function, training.import_path, asked.params)
    with recorded() as seen:
        if training.reports == "ray.train":
            in_ray_train(lambda _config: ended.append(_drive(script, function)), {})
        else:
            ended.append(_drive(script, function))
    told = _told(script, seen, ended[0])
    told["source"] = inspect.getsource(sys.modules[training.function().__module__]).splitlines()
    arguments.output.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
