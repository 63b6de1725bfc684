"""Faults that a trial comes through: damaged commits are told, and failures from outside are tried again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.fault_events import CommitDamaged
from orchestrator.control.journal import read_history
from orchestrator.control.orders import Cause, Events, Fallback, Outcome, Retry, Status
from orchestrator.control.world import TrialState
from orchestrator.driver import require_retries
from orchestrator.errors import ConfigError
from orchestrator.policies.plan import TrialId
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.worlds import Worker, World

T0, T1 = TrialId("t0"), TrialId("t1")


def started(tmp_path: Path) -> tuple[World, list[Worker]]:
    world = World(tmp_path / "r")
    workers = [world.attach("slot-0"), world.attach("slot-1")]
    for trial_id in (T0, T1):
        world.controller.submit(trial_id, {"lr": 0.1})
        world.ask(trial_id, 0)
    world.decide()
    for worker in workers:
        worker.obey()
        worker.report(0)
    return world, workers


def fail(worker: Worker, cause: Cause, reason: str) -> None:
    assert worker.attempt is not None
    outcome = Outcome(status=Status.FAILED, step=7, num_samples=56, reason=reason, cause=cause)
    worker.world.controller.finish(worker.slot_id, worker.epoch, worker.attempt, outcome)


def test_a_damaged_commit_is_in_journal_story_and_table_with_what_it_costs(tmp_path: Path) -> None:
    world, workers = started(tmp_path)
    told = Events(number=1, fallbacks=(Fallback(checkpoint="/c/9", step=3, num_steps=6),))
    assert workers[0].tell(told)
    assert workers[0].tell(told), "sent again"
    world.flush()
    found = list(read_history(world.run_dir).of(CommitDamaged))
    assert [(each.checkpoint, each.step, each.num_steps) for each in found] == [("/c/9", 3, 6)]
    assert "! went on from step 3: 6 later steps were in a damaged checkpoint" in world.shown()
    assert "/c/9 is damaged" in world.trial(T0).story[-1]


def test_resume_tries_again_what_failed_from_outside(tmp_path: Path) -> None:
    world, workers = started(tmp_path)
    fail(workers[0], Cause.DEVICE, "the GPU failed")
    fail(workers[1], Cause.OWN, "ValueError: a mistake")
    world.close()
    world.start_id = "s2"
    world.restart()
    assert world.trial(T0).state is TrialState.QUEUED
    assert (world.trial(T0).attempt, world.trial(T0).checkpoint) == (1, "/c/0")
    assert world.trial(T1).state is TrialState.FAILED
    worker = world.attach("slot-0")
    world.ask(T0, 1)
    world.decide()
    worker.obey()
    for index in (1, 2):
        world.ask(T0, index)
        worker.report(index)
    worker.finish()
    world.close()
    assert world.trial(T0).state is TrialState.DONE
    assert verify(world.run_dir)["violations"] == []


def test_only_a_new_start_of_the_run_tries_again(tmp_path: Path) -> None:
    """A restarted actor must not: the search was told of the failure already."""
    world, workers = started(tmp_path)
    fail(workers[0], Cause.DEVICE, "the GPU failed")
    world.perform()
    world.restart()
    assert world.trial(T0).state is TrialState.FAILED


def test_with_retry_failed_every_trial_goes_on_and_behind_damage_from_its_beginning(tmp_path: Path) -> None:
    world, workers = started(tmp_path)
    fail(workers[0], Cause.DAMAGE, "step-9 is damaged")
    fail(workers[1], Cause.OWN, "ValueError: a mistake")
    world.close()
    world.start_id = "s2"
    world.controller = type(world.controller)(world.spec, world.clock, incarnation="i")
    world.controller.begin(world.start_id, Retry.ALL)
    assert [world.trial(each).state for each in (T0, T1)] == [TrialState.QUEUED] * 2
    assert [world.trial(each).checkpoint for each in (T0, T1)] == [None, "/c/0"]


def test_a_search_of_the_user_s_own_says_itself_what_is_tried_again(tmp_path: Path) -> None:
    world, workers = started(tmp_path)
    fail(workers[0], Cause.DEVICE, "the GPU failed")
    world.close()
    world.controller = type(world.controller)(world.spec, world.clock, incarnation="i")
    world.controller.begin("s2", Retry.NONE)
    assert world.trial(T0).state is TrialState.FAILED


def test_slots_that_died_under_a_trial_too_often_are_a_reason_from_outside(tmp_path: Path) -> None:
    world, workers = started(tmp_path)
    for _ in range(2):
        world.controller.lose_slot(workers[0].slot_id, "killed")
        workers[0] = world.attach("slot-0")
        world.decide()
        workers[0].obey()
    assert (world.trial(T0).state, world.trial(T0).cause) == (TrialState.FAILED, Cause.PROCESS)


def test_a_run_that_is_done_is_resumed_only_for_what_can_be_tried_again(tmp_path: Path) -> None:
    failed = {"trial_id": "t0", "state": "failed", "cause": None}
    with pytest.raises(ConfigError, match="--retry-failed"):
        require_retries({"trials": [failed]}, tmp_path, retries_all=False)
    with pytest.raises(ConfigError, match=r"nothing to resume$"):
        require_retries({"trials": [{"state": "done"}]}, tmp_path, retries_all=True)
    require_retries({"trials": [failed]}, tmp_path, retries_all=True)
    require_retries({"trials": [failed | {"cause": "disk"}]}, tmp_path, retries_all=False)


def test_a_cause_is_written_and_read_again(tmp_path: Path) -> None:
    world, workers = started(tmp_path)
    fail(workers[0], Cause.MEMORY, "out of memory")
    world.perform()
    status = next(each for each in world.status().now()["trials"] if each["trial_id"] == T0)
    assert status["cause"] == "memory"
    before = replace(world.spec)
    world.restart()
    assert world.spec == before
    assert world.trial(T0).cause is Cause.MEMORY
