"""Several trials in one process: each trains as it does alone, and what happens to one leaves the others alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.control.orders import Outcome, SlotOp, SlotOrder, Status, StopMode
from orchestrator.policies.plan import TrialId
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import FLAG_BUNDLE, num_steps_of
from orchestrator.train.boundary import Boundary
from orchestrator.train.bundle.bundle import Bundle
from orchestrator.train.bundle.company import Company
from orchestrator.train.isolation import ProcessState
from orchestrator.train.lanes import Lane, LaneServer, Shared
from tests.unit.orchestrator.train.links import ONE_RANK, FakeShare, Script, grant, loop, order
from tests.unit.orchestrator.train.test_loop import job_of

PARAMS: tuple[dict[str, Any], ...] = ({"lr": 0.01}, {"lr": 0.05}, {"lr": 0.2}, {"lr": 0.1, "width": 24})
"""The last one is of another shape."""


class LaneScript(Script):
    """A lane's outside: one trial by script, then the order to close."""

    def __init__(self, order: SlotOrder) -> None:
        super().__init__(order)
        self.outcome: Outcome | None = None

    def begin(self, trial_id: TrialId, attempt: int) -> None:
        assert self._order.trial is not None
        assert (trial_id, attempt) == (self._order.trial.trial_id, self._order.trial.attempt)

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._order = replace(self._order, op=SlotOp.CLOSE, trial=None)
        self.version += 1


def first_order(directory: Path, index: int, **changes: object) -> SlotOrder:
    made = order(directory / str(index), **changes)  # type: ignore[arg-type]
    assert made.trial is not None
    params = {"width": 16, "num_samples": 512, **PARAMS[index]}
    return replace(made, trial=replace(made.trial, trial_id=TrialId(f"t{index}"), params=params))


def serve(scripts: list[LaneScript], share: FakeShare | None = None, company: Company | None = None) -> None:
    shared, company = Shared(share or FakeShare()), company or Company()
    lanes = [
        Lane(number, script, Boundary(script, 0, 1, None), shared.lane(number)) for number, script in enumerate(scripts)
    ]
    LaneServer(lanes, ONE_RANK, shared, ProcessState.capture(), company, threading.Event()).serve()


def alone(directory: Path, index: int, *changes: tuple[int, Callable[[SlotOrder], SlotOrder]]) -> Script:
    first = first_order(directory, index)
    script = Script(first)
    for num_steps, change in changes:
        script.at(num_steps, change)
    loop(script, job_of(first)).run()
    script.collect()
    return script


def metrics(script: Script) -> list[float]:
    script.collect()
    return [report.metrics["val_loss"] for report in script.reports]


def test_trials_side_by_side_end_as_they_do_alone(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(4)]
    serve(scripts)
    for index, script in enumerate(scripts):
        wanted = alone(tmp_path / "alone", index)
        assert script.outcome is not None
        assert script.outcome.status is Status.DONE
        assert metrics(script) == pytest.approx(metrics(wanted), rel=1e-5)
        assert script.records["loss"] == pytest.approx(wanted.records["loss"], rel=1e-5)
        assert (script.records["cursor"] == wanted.records["cursor"]).all()
        assert [(ack.generation, ack.step) for ack in script.acks] == [(1, 0)]
    log = (tmp_path / "lanes" / "1" / "log.txt").read_text()
    assert "step mode at step" in log
    assert "in a bundle" in log
    assert "trial t1 attempt 0 ends: done" in log
    assert "t2" not in log


def test_one_that_stops_or_pauses_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    scripts[0].at(7, lambda now: replace(now, stop=StopMode.DISCARD))
    scripts[1].at(9, lambda now: replace(now, stop=StopMode.CHECKPOINT))
    serve(scripts)
    outcomes = [script.outcome for script in scripts]
    assert [outcome.status for outcome in outcomes if outcome is not None] == [
        Status.STOPPED,
        Status.INTERRUPTED,
        Status.DONE,
    ]
    assert metrics(scripts[2]) == pytest.approx(metrics(alone(tmp_path / "alone", 2)), rel=1e-5)
    interrupted = outcomes[1]
    assert interrupted is not None
    first = first_order(tmp_path / "lanes", 1)
    assert first.trial is not None
    again = replace(first, trial=replace(first.trial, attempt=1, resume_from=interrupted.checkpoint))
    rest = Script(again)
    loop(rest, job_of(again)).run()
    assert metrics(rest) == pytest.approx(metrics(alone(tmp_path / "alone", 1)), rel=1e-5)


def test_a_trial_that_raises_ends_alone(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    broken = first_order(tmp_path / "lanes", 1)
    assert broken.trial is not None
    scripts[1] = LaneScript(replace(broken, trial=replace(broken.trial, resume_from=str(tmp_path / "nothing"))))
    serve(scripts)
    assert scripts[1].outcome is not None
    assert scripts[1].outcome.status is Status.FAILED
    assert "DamagedError" in scripts[1].outcome.reason
    for index in (0, 2):
        assert metrics(scripts[index]) == pytest.approx(metrics(alone(tmp_path / "alone", index)), rel=1e-5)


def test_each_step_of_the_process_is_a_sign_of_life_of_all_its_lanes(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path, index)) for index in (0, 1, 3)]  # two as one, and one alone
    seen: list[list[int | None]] = []

    def look(now: SlotOrder) -> SlotOrder:
        beats = [script.outbox.take().beat for script in scripts]
        seen.append([None if beat is None else beat.number for beat in beats])
        return now

    for number in (4, 12, 20):
        scripts[0].at(number, look)
    serve(scripts)
    first, second, third = seen
    assert all(number is not None and number == numbers[0] for numbers in seen for number in numbers)
    assert (first[0] or 0) < (second[0] or 0) < (third[0] or 0)
    assert [script.outbox.take().beat for script in scripts] == [None, None, None], "there is no trial any more"


def test_a_turn_of_batch_or_tier_takes_a_trial_into_another_bundle(tmp_path: Path) -> None:
    def turn(now: SlotOrder) -> SlotOrder:
        return replace(now, grant=grant(2, micro_batch=16, tier=Tier.BF16))

    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    for script in scripts[:2]:
        script.at(5, turn)
    serve(scripts)
    for index, script in enumerate(scripts):
        wanted = alone(tmp_path / "alone", index, *([(5, turn)] if index < 2 else []))
        assert metrics(script) == pytest.approx(metrics(wanted), rel=1e-5 if index == 2 else 2e-2)
        assert (script.records["micro_batch"] == wanted.records["micro_batch"]).all()


def test_a_paused_trial_goes_on_where_it_was(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    scripts[0].at(6, lambda now: replace(now, grant=grant(2, share=0.0)))
    others = scripts[1]
    others.at(12, lambda now: now)
    resume = scripts[0]
    add = others.outbox.add_record

    def counted(row: tuple[float, ...]) -> None:
        add(row)
        if others._num_steps == 12:
            resume._order = replace(resume._order, grant=grant(3))
            resume.version += 1

    others.outbox.add_record = counted  # type: ignore[method-assign]
    serve(scripts)
    for index, script in enumerate(scripts):
        assert metrics(script) == pytest.approx(metrics(alone(tmp_path / "alone", index)), rel=1e-5)


def test_one_that_cannot_be_stacked_steps_alone_and_says_why(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    first = first_order(tmp_path / "lanes", 2)
    assert first.trial is not None
    scripts[2] = LaneScript(replace(first, trial=replace(first.trial, params={**first.trial.params, "seed": 5})))
    tf32 = first_order(tmp_path / "lanes", 0, grant=grant(1, tier=Tier.TF32))
    scripts[0] = LaneScript(tf32)
    serve(scripts)
    logs = [(tmp_path / "lanes" / str(index) / "log.txt").read_text() for index in range(3)]
    assert "steps alone: tier tf32 is computed by functions of its own on cpu" in logs[0]
    assert all("in a bundle" in log and "steps alone" not in log for log in logs[1:])  # another data seed may differ
    assert metrics(scripts[1]) == pytest.approx(metrics(alone(tmp_path / "alone", 1)), rel=1e-5)


def test_compiled_bundles_have_rows_to_spare_and_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling itself is left out: what is traced for it runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    scripts[0].at(7, lambda now: replace(now, stop=StopMode.DISCARD))
    serve(scripts, company=Company(is_compiled=True))
    for index in (1, 2):
        assert metrics(scripts[index]) == pytest.approx(metrics(alone(tmp_path / "alone", index)), rel=1e-5)


@pytest.mark.parametrize(("step_s", "is_kept"), [(1e-7, True), (10.0, False)])
def test_a_bundle_that_is_slower_than_its_trials_alone_is_given_up(
    step_s: float, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "step_s", property(lambda _: step_s))
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(2)]
    serve(scripts, company=Company(is_measured=True))
    flags = scripts[0].records["flags"] & FLAG_BUNDLE != 0
    assert not flags[:2].any()  # it begins with steps alone
    assert flags[4:9].all()
    assert flags[12:].all() == flags[12:].any() == is_kept
    log = (tmp_path / "lanes" / "0" / "log.txt").read_text()
    assert ("steps alone: as one a step takes 5e+03 ms of each trial" in log) != is_kept
    for index in range(2):
        assert metrics(scripts[index]) == pytest.approx(metrics(alone(tmp_path / "alone", index)), rel=1e-5)


def test_one_that_steps_alone_gets_as_much_time_as_a_bundle(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in (0, 1, 3)]
    serve(scripts, company=Company(target_s=10.0))
    lone = scripts[2].records
    rounds = scripts[0].records
    assert len(rounds) < 20
    assert len(lone) == 40  # a record for each of its steps, and yet it keeps up
    assert metrics(scripts[2]) == pytest.approx(metrics(alone(tmp_path / "alone", 3)), rel=1e-5)


def test_many_short_steps_are_told_of_in_one_record(tmp_path: Path) -> None:
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(3)]
    serve(scripts, company=Company(target_s=10.0))
    for index, script in enumerate(scripts):
        wanted = alone(tmp_path / "alone", index)
        records = script.records
        assert metrics(script) == pytest.approx(metrics(wanted), rel=1e-5)
        assert len(records) < len(wanted.records)
        num_steps = num_steps_of(records)
        assert num_steps.sum() == len(wanted.records)
        assert (records["step"] == num_steps.cumsum() - num_steps).all()
        assert (records["cursor"] + records["num_samples"])[-1] == 320
        ends_s = records["start_s"] + records["step_s"]
        assert (records["start_s"][1:] >= ends_s[:-1] - 1e-4).all()


def test_the_process_has_the_share_of_its_lanes_together() -> None:
    real = FakeShare()
    shared = Shared(real)
    first, second = shared.lane(0), shared.lane(1)
    first.apply((0,), 0.25)
    second.apply((0, 1), 1.0)
    first.release()
    assert real.applied == [((0,), 0.25), ((0, 1), 1.25), ((0, 1), 1.0)]


def test_random_state_is_each_trials_own(tmp_path: Path) -> None:
    """Evaluations and probes of one draw nothing from another's generators."""
    scripts = [LaneScript(first_order(tmp_path / "lanes", index)) for index in range(2)]
    serve(scripts)
    saved = [sorted(Path(tmp_path, "lanes", str(index), "checkpoints").glob("*/rng_rank0.pt")) for index in range(2)]
    alone(tmp_path / "alone", 0)
    wanted = sorted(Path(tmp_path, "alone", "0", "checkpoints").glob("*/rng_rank0.pt"))
    states = [torch.load(paths[-1], weights_only=True)["torch"] for paths in (*saved, wanted)]
    assert torch.equal(states[0], states[2])
