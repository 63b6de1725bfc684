"""What people and programs ask of a run that goes on: done once, journalled with who asked, and refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.journal import read
from orchestrator.control.orders import Resumption, SlotOp, Status, StopMode
from orchestrator.control.spec import StopRule
from orchestrator.control.world import TrialState
from orchestrator.errors import RequestError
from orchestrator.policies.plan import TrialId
from orchestrator.requests import Request
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.states import durable_state
from tests.unit.orchestrator.control.test_moves import ONE, TWO
from tests.unit.orchestrator.control.worlds import Worker, World

T0, ADDED = TrialId("t0"), TrialId("added-00000")
BY = "anna@host"


def request(command: str, trial_id: str = "", request_id: str = "q1", **values: Any) -> Request:
    return Request(request_id=request_id, command=command, trial_id=trial_id, values=values, by=BY)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "r")


def begin(world: World, trial_id: TrialId = T0, slot_id: str = "slot-0") -> Worker:
    worker = world.attach(slot_id)
    world.controller.submit(trial_id, {"lr": 0.1}, Resumption(token="t"))
    world.decide()
    worker.obey()
    return worker


def commit(world: World, worker: Worker, index: int, trial_id: TrialId = T0) -> None:
    """A report with a commit that is there."""
    directory = world.run_dir / "trials" / trial_id / "checkpoints" / f"step-{worker.step}"
    directory.mkdir(parents=True)
    (directory / "weights").write_text("w")
    world.controller.want(trial_id, index)
    worker.report(index)
    trial = world.trial(trial_id)
    made = trial.reports[index]
    object.__setattr__(made, "checkpoint", str(directory))
    world.commits[str(directory)] = worker.step, worker.position


def train_to_the_end(world: World, worker: Worker, trial_id: TrialId) -> None:
    spec = world.controller.run.spec
    for _ in range(200):
        world.decide()
        order = worker.order()
        if order is None or order.op is not SlotOp.RUN or order.trial is None or order.trial.trial_id != trial_id:
            return
        worker.obey()
        trial = world.trial(trial_id)
        if worker.position >= (len(trial.reports) + 1) * spec.samples_per_report:
            assert order.credit > len(trial.reports), "nobody lets it go on"
            worker.report(len(trial.reports))
            if len(trial.reports) == spec.max_reports:
                worker.finish()
    raise AssertionError(world.trial(trial_id).story)


def test_a_trial_that_is_added_trains_to_its_end_without_the_search(world: World) -> None:
    answer = world.controller.steer(request("add", lr=0.5))
    assert answer == {"command": "add", "trial_id": ADDED}
    worker = world.attach("slot-0")
    train_to_the_end(world, worker, ADDED)
    trial = world.trial(ADDED)
    assert trial.state is TrialState.DONE
    assert trial.params == {"lr": 0.5, "depth": 2}
    assert len(trial.reports) == world.controller.run.spec.max_reports
    (entry,) = [each for each in read(world.run_dir / "journal.jsonl") if each["kind"] == "request"]
    assert (entry["by"], entry["command"], entry["values"]) == (BY, "add", {"lr": 0.5})
    world.flush()
    assert verify(world.run_dir)["violations"] == []


def test_a_request_that_comes_again_is_done_once_whoever_died_meanwhile(world: World) -> None:
    first = world.controller.steer(request("add", lr=0.5))
    assert world.controller.steer(request("add", lr=0.5)) == first
    before = durable_state(world.controller.world, world.controller.run)
    world.restart()
    assert durable_state(world.controller.world, world.controller.run) == before
    assert world.controller.steer(request("add", lr=0.5)) == first
    assert list(world.controller.run.trials) == [ADDED]
    assert world.trial(ADDED).credit == world.controller.run.spec.max_reports
    second = world.controller.steer(request("add", request_id="q2", lr=0.5))
    assert second["trial_id"] == "added-00001"


def test_the_search_is_judged_without_those_that_were_added(tmp_path: Path) -> None:
    world = World(tmp_path / "r", stop_rule=StopRule(name="asha", rung_patience=1.0))
    world.controller.steer(request("add", lr=0.5))
    added = world.attach("slot-0")
    world.decide()
    added.obey()
    added.report(0, value=0.1)
    assert world.controller.run.rungs.rungs[1].held == {}
    assert not world.controller.run.ranking._values
    worker = begin(world, slot_id="slot-1")
    world.controller.want(T0, 0)
    worker.report(0)
    assert world.ask(T0, 0) is not None, "it waits for nobody"


def test_a_clone_goes_on_behind_the_newest_report_with_other_parameters(world: World) -> None:
    worker = begin(world)
    with pytest.raises(RequestError, match="no report with a commit") as caught:
        world.controller.steer(request("clone", T0, lr=0.9))
    assert caught.value.code == "no_commit"
    commit(world, worker, 0)
    step = worker.step
    answer = world.controller.steer(request("clone", T0, lr=0.9))
    assert answer == {"command": "clone", "trial_id": ADDED}
    other = world.attach("slot-1")
    clone = world.trial(ADDED)
    assert clone.checkpoint is not None
    assert Path(clone.checkpoint).is_relative_to(world.run_dir / "trials" / ADDED), "kept where nobody prunes it"
    world.commits[clone.checkpoint] = step, worker.position
    for each in (worker, other):  # what the first gives back goes to the second
        world.decide()
        each.obey()
    assert clone.params == {"lr": 0.9, "depth": 2}
    assert other.step == step + 5
    assert len(clone.reports) == 1
    train_to_the_end(world, other, ADDED)
    assert world.trial(ADDED).state is TrialState.DONE


def test_a_trial_that_somebody_paused_stays_away_until_they_resume_it(world: World) -> None:
    worker = begin(world)
    world.controller.steer(request("pause", T0))
    assert world.trial(T0).stop is StopMode.PAUSE
    left_at = worker.step
    assert worker.leave()
    assert world.trial(T0).state is TrialState.PAUSED
    assert "paused by request" in world.shown()
    world.controller.submit(T0, {"lr": 0.1}, Resumption(token="another life"))  # as a search does that lost its answer
    world.decide()
    assert world.trial(T0).state is TrialState.PAUSED
    world.restart()
    assert world.trial(T0).is_held
    world.controller.steer(request("resume", T0, request_id="q2"))
    assert world.trial(T0).state is TrialState.RUNNING
    world.decide()
    worker.obey()
    assert worker.step == left_at + 5
    assert world.trial(T0).has_stand_in
    assert f"{BY} asked for: pause" in world.trial(T0).story


def test_who_resumes_a_trial_that_has_not_left_yet_has_it_go_on_when_it_has(world: World) -> None:
    worker = begin(world)
    world.controller.steer(request("pause", T0))
    world.controller.steer(request("resume", T0, request_id="q2"))
    assert worker.leave()
    assert world.trial(T0).state is TrialState.RUNNING


def test_a_trial_that_waits_can_be_paused_and_resumed(world: World) -> None:
    world.controller.submit(T0, {"lr": 0.1}, Resumption(token="t"))
    world.controller.steer(request("pause", T0))
    worker = world.attach("slot-0")
    assert world.trial(T0).state is TrialState.PAUSED
    world.controller.steer(request("resume", T0, request_id="q2"))
    world.decide()
    worker.obey()
    assert worker.step


def test_a_stopped_trial_ends_and_can_be_taken_up_again(world: World) -> None:
    worker = begin(world)
    commit(world, worker, 0)
    world.controller.steer(request("stop", T0))
    assert world.trial(T0).stop is StopMode.DISCARD
    worker.finish(Status.STOPPED)
    assert world.trial(T0).state is TrialState.STOPPED
    with pytest.raises(RequestError) as caught:
        world.controller.steer(request("pause", T0, request_id="q2"))
    assert caught.value.code == "trial_ended"
    world.controller.steer(request("resume", T0, request_id="q3"))
    world.decide()
    trial = world.trial(T0)
    assert (trial.state, trial.has_stand_in, trial.credit) == (TrialState.RUNNING, False, 3)


def test_terms_change_while_the_run_goes_on_for_all_or_for_one(world: World) -> None:
    begin(world)
    begin(world, TrialId("t1"), "slot-1")
    world.controller.steer(request("set", weight=2.0))
    world.controller.steer(request("set", "t1", request_id="q2", priority=3))
    for _ in range(2):
        snapshot = world.snapshot()
        assert snapshot is not None
        assert [(view.weight, view.priority) for view in snapshot.trials] == [(2.0, 0), (2.0, 3)]
        world.restart()


def test_a_weight_moves_shares_at_the_next_decision(world: World) -> None:
    begin(world)
    begin(world, TrialId("t1"), "slot-1")
    world.controller.steer(request("set", T0, weight=3.0))
    world.decide()
    assert {a.trial_id: a.settings.share for a in world.controller.run.plan.allocations} == {T0: 0.75, "t1": 0.25}


@pytest.mark.parametrize("command", ["clone", "stop", "pause", "resume", "set"])
def test_a_trial_that_is_not_there_is_named_with_those_that_are(world: World, command: str) -> None:
    begin(world)
    with pytest.raises(RequestError, match="there is no trial 't9'; allowed: t0") as caught:
        world.controller.steer(request(command, "t9"))
    assert caught.value.code == "no_trial"


def test_a_trial_that_runs_cannot_be_resumed(world: World) -> None:
    begin(world)
    with pytest.raises(RequestError) as caught:
        world.controller.steer(request("resume", T0))
    assert caught.value.code == "not_paused"


def test_a_function_is_paused_behind_a_report_with_a_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path / "r", "fifo", places=True, is_function=True)
    one = world.attach("slot-0", devices=(ONE,))
    world.attach("slot-1", devices=(TWO,))
    world.controller.submit(T0, {}, Resumption(token="t"))
    world.controller.want(T0, 0)
    world.decide()
    one.obey()
    with pytest.raises(RequestError, match="has reported no checkpoint") as caught:
        world.controller.steer(request("pause", T0))
    assert caught.value.code == "no_commit"
    one.report(0)
    world.controller.want(T0, 1)  # it goes on already
    world.controller.steer(request("pause", T0))
    assert not one.leave()
    one.report(1)
    assert one.leave()
    assert world.trial(T0).state is TrialState.PAUSED
