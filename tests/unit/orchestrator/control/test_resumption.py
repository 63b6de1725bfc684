"""Trials that are put aside, taken up again, and given the state of another trial; and all of it after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.orders import Resumption, SlotOp, Status, StopMode
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import TrialId
from tests.unit.orchestrator.control.worlds import Worker, World

A, B = TrialId("trial-a"), TrialId("trial-b")


def again(token: str = "t2", **fields: object) -> Resumption:
    return Resumption(token=token, **fields)  # type: ignore[arg-type]


def commit(world: World, trial_id: TrialId, step: int) -> str:
    path = world.run_dir / "trials" / trial_id / "checkpoints" / f"step-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(f"{trial_id} {step}")
    return str(path)


def started(world: World, trial_id: TrialId, slot_id: str) -> Worker:
    """A trial that runs, with one report behind it."""
    worker = world.attach(slot_id)
    world.controller.submit(trial_id, {"lr": 0.1}, Resumption(token="t1"))
    world.decide()
    worker.obey()
    path = commit(world, trial_id, worker.step)
    worker.report(0)
    trial = world.trial(trial_id)
    trial.reports[0] = trial.reports[0].__class__(
        index=0, step=worker.step, num_samples=worker.position, metrics={"val_loss": 1.0}, checkpoint=path
    )
    trial.checkpoint = path
    return worker


def state_of(world: World, trial_id: TrialId) -> TrialState:
    return world.trial(trial_id).state


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def test_a_paused_trial_commits_leaves_its_slot_and_holds_nothing(world: World) -> None:
    worker = started(world, A, "slot-0")
    world.controller.pause(A)
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.PAUSE
    worker.finish(Status.INTERRUPTED, checkpoint="/c/mid")
    assert state_of(world, A) is TrialState.PAUSED
    assert world.held() == 0
    world.controller.submit(B, {}, Resumption(token="t1"))
    order = worker.order()
    assert order is not None
    assert order.trial is not None
    assert order.trial.trial_id == B, "its room is taken at once"


def test_a_paused_trial_goes_on_from_its_last_commit(world: World) -> None:
    worker = started(world, A, "slot-0")
    world.controller.pause(A)
    worker.finish(Status.INTERRUPTED, checkpoint="/c/mid")
    world.controller.submit(A, {"lr": 0.1}, again())
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.RUN
    assert order.trial is not None
    assert order.trial.resume_from == "/c/mid"
    assert (order.trial.attempt, order.trial.num_reports_done) == (1, 1)


def test_a_resend_changes_nothing(world: World) -> None:
    started(world, A, "slot-0")
    for _ in range(2):
        world.controller.submit(A, {"lr": 0.1}, Resumption(token="t1"))
    trial = world.trial(A)
    assert (trial.state, trial.attempt) == (TrialState.RUNNING, 0)


def test_a_new_life_of_its_stand_in_leaves_a_running_trial_alone(world: World) -> None:
    started(world, A, "slot-0")
    world.controller.submit(A, {"lr": 0.1}, again())
    assert world.trial(A).stop is StopMode.NONE


def test_going_on_before_the_slot_is_left_happens_when_it_is(world: World) -> None:
    worker = started(world, A, "slot-0")
    world.controller.pause(A)
    world.controller.submit(A, {"lr": 0.1}, again())
    assert state_of(world, A) is TrialState.RUNNING
    worker.finish(Status.INTERRUPTED, checkpoint="/c/mid")
    assert state_of(world, A) is TrialState.RUNNING
    assert world.trial(A).attempt == 1


def exploited(world: World) -> tuple[Worker, dict[str, object]]:
    """Trial B runs, has reported, and shall take up the state of A with another learning rate."""
    started(world, A, "slot-0")
    pointer = world.controller.pin(A, 1)
    worker = started(world, B, "slot-1")
    worker.obey()  # it is further than its donor
    commit(world, B, worker.step)
    world.controller.pause(B)
    worker.finish(Status.INTERRUPTED, checkpoint="/c/b")
    world.controller.submit(B, {"lr": 0.2}, again(**pointer))
    return worker, pointer


def test_a_trial_takes_up_the_state_of_another_with_its_own_parameters(world: World) -> None:
    worker, pointer = exploited(world)
    order = worker.order()
    assert order is not None
    assert order.trial is not None
    assert order.trial.resume_from == pointer["checkpoint"]
    assert Path(str(order.trial.resume_from)).is_dir()
    assert order.trial.params["lr"] == 0.2
    assert order.trial.num_reports_done == 1
    assert order.credit == 1, "it waits for the search behind the report it starts from"


def test_commits_of_the_course_that_is_given_up_are_gone(world: World) -> None:
    exploited(world)
    world.perform()
    assert not (world.run_dir / "trials" / B / "checkpoints").exists()
    assert (world.run_dir / "trials" / A / "checkpoints").exists()


def test_a_pinned_state_outlives_its_commit_and_only_some_are_kept(world: World) -> None:
    worker = started(world, A, "slot-0")
    trial = world.trial(A)
    kept = [world.controller.pin(A, 1)["checkpoint"]]
    for index in range(1, 7):
        worker.obey()
        path = commit(world, A, worker.step)
        worker.report(index)
        trial.reports[index] = trial.reports[index].__class__(
            index=index, step=worker.step, num_samples=worker.position, metrics={}, checkpoint=path
        )
        kept.append(world.controller.pin(A, index + 1)["checkpoint"])
    assert [Path(path).is_dir() for path in kept] == [False] * 3 + [True] * 4
    assert world.controller.pin(A, 7)["checkpoint"] == kept[-1]


def test_what_cannot_be_pinned_says_why(world: World) -> None:
    started(world, A, "slot-0")
    with pytest.raises(ValueError, match="has reported 1 times, not 3"):
        world.controller.pin(A, 3)


@pytest.mark.parametrize(("reopens", "state"), [(True, TrialState.RUNNING), (False, TrialState.FAILED)])
def test_only_a_search_of_the_users_own_opens_a_failed_trial_again(
    world: World, reopens: bool, state: TrialState
) -> None:
    worker = started(world, A, "slot-0")
    worker.finish(Status.FAILED, reason="boom")
    world.controller.submit(A, {"lr": 0.1}, again(reopens=reopens))
    assert state_of(world, A) is state


def test_an_interrupted_run_puts_no_trial_aside(world: World) -> None:
    world.controller.submit(A, {})
    world.controller.interrupt()
    world.controller.pause(A)
    assert state_of(world, A) is TrialState.QUEUED


def test_a_done_trial_stays_done(world: World) -> None:
    worker = started(world, A, "slot-0")
    worker.finish(Status.DONE)
    world.controller.submit(A, {"lr": 0.1}, again(reopens=True))
    assert state_of(world, A) is TrialState.DONE


def test_a_trial_of_another_run_cannot_go_on_here(world: World) -> None:
    with pytest.raises(ValueError, match="resume=True"):
        world.controller.submit(A, {}, again(origin=B, num_reports=2, checkpoint="/elsewhere"))


def test_what_is_still_put_aside_at_the_end_is_stopped(world: World) -> None:
    worker = started(world, A, "slot-0")
    world.controller.pause(A)
    worker.finish(Status.INTERRUPTED, checkpoint="/c/mid")
    world.controller.end_paused()
    assert state_of(world, A) is TrialState.STOPPED


def test_a_search_without_slots_hears_why(world: World) -> None:
    world.controller.submit(A, {})
    world.controller.give_up("no room")
    world.controller.submit(B, {})
    for trial_id in (A, B):
        answer = world.ask(trial_id, 0)
        assert answer is not None
        assert (answer.state, answer.reason) == (TrialState.FAILED, "no room")


def test_a_restarted_actor_knows_who_is_paused_and_who_took_up_what(world: World) -> None:
    exploited(world)
    started_c = TrialId("trial-c")
    world.controller.submit(started_c, {}, Resumption(token="t1"))
    world.controller.pause(started_c)
    before = world.controller.run.trials
    world.restart()
    after = world.controller.run.trials
    for trial_id in (A, B, started_c):
        mine, theirs = before[trial_id], after[trial_id]
        names = ["state", "attempt", "params", "step", "num_samples"]
        names += [] if trial_id == A else ["checkpoint"]  # that of A was set by hand
        for name in names:
            assert getattr(mine, name) == getattr(theirs, name), (trial_id, name)
        assert len(mine.reports) == len(theirs.reports)
