"""A policy pauses trials and chooses their devices: nothing is repeated or over-committed, and all come to an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.grants import held
from orchestrator.control.journal import read
from orchestrator.control.orders import SlotOp, Status, StopMode
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.states import durable_state
from tests.unit.orchestrator.control.worlds import Worker, World

T0, T1, T2 = TrialId("t0"), TrialId("t1"), TrialId("t2")
ONE = DeviceView(device_id=DeviceId("cpu:1"), node_id="n1", kind=DeviceKind.CPU, units=2)
TWO = DeviceView(device_id=DeviceId("cpu:2"), node_id="n2", kind=DeviceKind.CPU, units=2)
ROUNDS = 400
POLICIES: tuple[tuple[str, dict[str, object]], ...] = (
    ("fifo", {}),
    ("fluid", {}),
    ("tiresias", {"thresholds_s": (0.3, 1.2)}),
    ("optimus", {}),
    ("pollux", {}),
    ("sia", {}),
    ("goodput_joint", {}),
    ("goodput", {}),
    ("fair_share", {}),
    ("static", {}),
)


def placing(
    path: Path, policy: str = "fifo", params: dict[str, object] | None = None, *, is_function: bool = False
) -> World:
    return World(path / "r", policy, policy_params=params or {}, places=True, is_function=is_function)


def entries(world: World, kind: str) -> list[dict[str, object]]:
    return [entry for entry in read(world.run_dir / "journal.jsonl") if entry["kind"] == kind]


def go_round(world: World, workers: list[Worker]) -> None:
    """One moment: a decision, and what every worker group does about its newest order."""
    world.clock.advance(0.05)
    world.decide()
    for worker in workers:
        order = worker.order()
        if order is None or order.op is not SlotOp.RUN or order.trial is None:
            continue
        worker.obey()
        if worker.leave() or worker.grant is None:
            continue
        trial = world.trial(order.trial.trial_id)
        spec = world.controller.run.spec
        if worker.position >= (len(trial.reports) + 1) * spec.samples_per_report:
            world.controller.want(trial.trial_id, len(trial.reports))
            worker.report(len(trial.reports))
            if len(trial.reports) == spec.max_reports:
                worker.finish()
    for device_id in world.controller.world.devices:
        assert held(world.controller.run.accounts(), device_id) <= 1.0 + 1e-9


def train_to_the_end(world: World, workers: list[Worker]) -> None:
    for _ in range(ROUNDS):
        go_round(world, workers)
        if all(trial.state.is_final for trial in world.controller.run.trials.values()):
            return
    raise AssertionError({key: trial.story for key, trial in world.controller.run.trials.items()})


@pytest.mark.parametrize(("policy", "params"), POLICIES, ids=[name for name, _ in POLICIES])
def test_all_trials_come_to_their_end_and_repeat_nothing(
    policy: str, params: dict[str, object], tmp_path: Path
) -> None:
    world = placing(tmp_path, policy, params)
    workers = [world.attach(f"slot-{number}", devices=(device,)) for number, device in enumerate((ONE, ONE, TWO, TWO))]
    for trial_id in (T0, T1, T2):
        world.controller.submit(trial_id, {})
    train_to_the_end(world, workers)
    assert [trial.state for trial in world.controller.run.trials.values()] == [TrialState.DONE] * 3
    assert entries(world, "refusal") == []
    world.flush()
    answer = verify(world.run_dir)
    assert answer["violations"] == []
    assert answer["checked"]["plans_replayed"] == answer["checked"]["plans"]
    world.close()


def test_of_two_trials_on_one_device_one_waits_and_the_plan_says_for_what(tmp_path: Path) -> None:
    world = placing(tmp_path)
    world.attach("slot-0", devices=(ONE,))
    world.attach("slot-1", devices=(ONE,))
    world.controller.submit(T0, {})
    world.controller.submit(T1, {})
    world.decide()
    assert [world.trial(each).state for each in (T0, T1)] == [TrialState.RUNNING, TrialState.QUEUED]
    (_, waits) = world.status().now()["trials"]
    assert "waits for 1 devices" in waits["decision"]["reason"]
    assert "waits for 1 devices" in world.shown()
    world.close()


def test_a_trial_that_is_paused_commits_and_comes_back_from_there(tmp_path: Path) -> None:
    world = placing(tmp_path, "tiresias", {"thresholds_s": (0.15,)})
    worker = world.attach("slot-0", devices=(ONE,))
    world.controller.submit(T0, {})
    world.clock.advance(0.01)
    world.controller.submit(T1, {})
    while not entries(world, "trial_requeued"):
        go_round(world, [worker])
    (entry,) = entries(world, "trial_requeued")
    assert (entry["trial_id"], entry["step"]) == (T0, world.commits[str(entry["checkpoint"])][0])
    assert "gave its devices back" in str(entry["reason"])
    assert entry["num_restarts"] == 0
    assert world.trial(T1).state is TrialState.RUNNING
    assert world.trial(T0).attained_s > 0
    train_to_the_end(world, [worker])
    world.flush()
    assert verify(world.run_dir)["violations"] == []
    assert world.controller.run.restart_s is not None, "what it cost is known"
    world.close()


def test_a_trial_moves_to_the_device_that_the_plan_has_for_it(tmp_path: Path) -> None:
    world = placing(tmp_path, "tests.moving_policy:Wanders")
    workers = [world.attach("slot-0", devices=(ONE,)), world.attach("slot-1", devices=(TWO,))]
    world.controller.submit(T0, {})
    train_to_the_end(world, workers)
    slots = [entry["slot_id"] for entry in entries(world, "trial_assigned")]
    assert slots[:3] == ["slot-0", "slot-1", "slot-0"]
    world.flush()
    assert verify(world.run_dir)["violations"] == []
    world.close()


def test_a_restarted_actor_knows_who_was_told_to_leave(tmp_path: Path) -> None:
    world = placing(tmp_path, "tiresias", {"thresholds_s": (0.15,)})
    worker = world.attach("slot-0", devices=(ONE,))
    world.controller.submit(T0, {})
    world.clock.advance(0.01)
    world.controller.submit(T1, {})
    while world.trial(T0).stop is StopMode.NONE:
        world.decide()
        worker.obey()
    before = durable_state(world.controller.world, world.controller.run)
    attained_s = world.trial(T0).attained_until(world.clock.now_s())
    world.flush()
    world.restart()
    assert durable_state(world.controller.world, world.controller.run) == before
    assert world.trial(T0).attained_until(world.clock.now_s()) == attained_s
    train_to_the_end(world, [worker])
    world.flush()
    assert verify(world.run_dir)["violations"] == []
    world.close()


def test_a_function_leaves_only_behind_a_report_with_a_checkpoint(tmp_path: Path) -> None:
    world = placing(tmp_path, "tests.moving_policy:Wanders", is_function=True)
    one, two = world.attach("slot-0", devices=(ONE,)), world.attach("slot-1", devices=(TWO,))
    world.controller.submit(T0, {})
    world.controller.want(T0, 0)
    for _ in range(30):
        world.decide()
        one.obey()
        assert not one.leave(), "it has no checkpoint yet, so it would begin anew"
    snapshot = world.snapshot()
    assert snapshot is not None
    assert not snapshot.trials[0].limits.can_pause
    assert snapshot.trials[0].target_samples is None
    one.report(0)
    snapshot = world.snapshot()
    assert snapshot is not None
    assert snapshot.trials[0].limits.can_pause
    world.decide()
    assert one.leave()
    world.decide()
    two.obey()
    assert (two.attempt, two.step) == ((T0, 1), one.step + 5)
    world.close()


def test_what_a_trial_had_is_free_before_another_begins_there(tmp_path: Path) -> None:
    world = placing(tmp_path, "tiresias", {"thresholds_s": (0.15,)})
    workers = [world.attach("slot-0", devices=(ONE,)), world.attach("slot-1", devices=(ONE,))]
    world.controller.submit(T0, {})
    world.clock.advance(0.01)
    world.controller.submit(T1, {})
    while world.trial(T0).stop is StopMode.NONE:
        world.decide()
        workers[0].obey()
    world.decide()
    assert world.trial(T1).slot_id is None, "a slot is free, but not the device"
    assert workers[0].leave()
    assert world.trial(T1).slot_id is not None
    world.close()


def test_a_slot_that_dies_costs_the_trial_no_place(tmp_path: Path) -> None:
    world = placing(tmp_path)
    worker = world.attach("slot-0", devices=(ONE,))
    world.controller.submit(T0, {})
    go_round(world, [worker])
    world.controller.lose_slot("slot-0", "killed")
    assert world.trial(T0).state is TrialState.QUEUED
    assert world.snapshot() is None, "there is no device with a slot, so there is nothing to decide"
    other = world.attach("slot-1", devices=(TWO,))
    train_to_the_end(world, [other])
    world.close()


def test_the_search_may_pause_or_stop_a_trial_that_is_leaving_for_the_policy(tmp_path: Path) -> None:
    for mode, state in ((StopMode.DISCARD, TrialState.STOPPED), (StopMode.PAUSE, TrialState.PAUSED)):
        world = placing(tmp_path / mode.value, "tiresias", {"thresholds_s": (0.15,)})
        worker = world.attach("slot-0", devices=(ONE,))
        world.controller.submit(T0, {})
        world.clock.advance(0.01)
        world.controller.submit(T1, {})
        while world.trial(T0).stop is StopMode.NONE:
            world.decide()
            worker.obey()
        if mode is StopMode.PAUSE:
            world.controller.pause(T0)
            assert worker.leave()
        else:
            world.controller.stop_trial(T0, mode)
            worker.finish(Status.STOPPED)
        assert world.trial(T0).state is state
        world.decide()
        assert world.trial(T1).state is TrialState.RUNNING
        world.close()


def test_as_many_share_a_device_as_it_has_slots(tmp_path: Path) -> None:
    world = placing(tmp_path, "fluid")
    for number in range(2):
        world.attach(f"slot-{number}", devices=(ONE,))
    for trial_id in (T0, T1, T2):
        world.controller.submit(trial_id, {})
    snapshot = world.snapshot()
    assert snapshot is not None
    assert {trial.limits.min_share for trial in snapshot.trials} == {0.5}
    world.decide()
    states = [trial.state for trial in world.controller.run.trials.values()]
    assert states == [TrialState.RUNNING, TrialState.RUNNING, TrialState.QUEUED]
    world.close()
