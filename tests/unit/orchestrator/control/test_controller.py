"""The controller: a whole run without Ray, its faults, and its recovery from the journal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.control import decisions
from orchestrator.control.journal import read
from orchestrator.control.orders import Events, Outcome, OverrideReport, SlotOp, Status, StopMode
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import Plan, Settings, TrialId
from orchestrator.policies.snapshot import StepModeView
from orchestrator.policies.tier import Tier
from tests.unit.orchestrator.control.worlds import World

T0, T1, T2 = TrialId("t0"), TrialId("t1"), TrialId("t2")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def test_a_trial_runs_reports_and_ends(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {"lr": 0.1})
    assert world.ask(T0, 0) is None
    world.decide()
    for index in range(3):
        world.ask(T0, index)
        worker.obey()
        worker.report(index)
        answer = world.ask(T0, index)
        assert answer is not None
        assert answer.report is not None
        assert answer.report.index == index
    worker.finish()
    last = world.ask(T0, 3)
    assert last is not None
    assert (last.state, last.report, last.is_last) == (TrialState.DONE, None, True)
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.IDLE
    assert world.held() == 0.0


def test_credit_is_what_the_search_asked_for(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    credits = []
    for index in range(2):
        world.ask(T0, index)
        order = worker.order()
        assert order is not None
        credits.append(order.credit)
    assert credits == [1, 2]


def test_two_trials_never_hold_more_than_the_device(world: World) -> None:
    first = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    first.obey()
    assert world.held() == 1.0
    second = world.attach("slot-1")
    world.controller.submit(T1, {})
    world.decide()
    order = second.order()
    assert order is not None
    assert order.grant is None, "nothing may be granted before the release is acknowledged"
    first.obey()
    order = second.order()
    assert order is not None
    assert order.grant is not None
    second.obey()
    assert world.held() == 1.0


def test_a_plan_is_on_disk_before_it_is_offered(world: World) -> None:
    world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    kinds = [entry["kind"] for entry in read(world.run_dir / "journal.jsonl")]
    assert kinds.index("plan") < kinds.index("offer")


def test_trials_that_wait_together_begin_in_the_order_of_the_search(world: World) -> None:
    for trial_id in (T2, T0, T1):
        world.controller.submit(trial_id, {})
    run = world.controller.run
    assert list(run.queue) == [T0, T1, T2]
    worker = world.attach("slot-0")
    world.decide()
    worker.obey()
    world.controller.lose_slot("slot-0", "gone")
    early = TrialId("s9")
    world.controller.submit(early, {})
    assert list(run.queue) == [T0, early, T1, T2], "one that has begun stays in front"


def test_a_dead_slot_gives_its_trial_back_at_the_front(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.controller.submit(T1, {})
    world.decide()
    worker.obey()
    worker.report(0)
    again = world.attach("slot-0")
    order = again.order()
    assert order is not None
    assert order.trial is not None
    assert (order.trial.trial_id, order.trial.attempt, order.trial.resume_from) == (T0, 1, "/c/0")
    assert order.trial.num_reports_done == 1
    assert worker.order() is None, "the earlier processes are fenced"


@pytest.mark.parametrize("policy", ["static", "fair_share", "goodput"])
def test_a_trial_that_comes_back_alone_is_granted_what_the_unchanged_plan_says(tmp_path: Path, policy: str) -> None:
    world = World(tmp_path / "run", policy_name=policy)
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    again = world.attach("slot-0")
    world.decide()
    again.obey()
    assert again.grant is not None
    world.decide()
    assert again.grant.generation == 2, "committed once, although nothing changed"


@pytest.mark.parametrize("policy", ["static", "fair_share", "goodput"])
def test_after_running_out_of_memory_a_trial_begins_again_with_the_dials_it_asked_for(
    tmp_path: Path, policy: str
) -> None:
    world = World(tmp_path / "run", policy_name=policy)
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    assert worker.grant is not None
    smaller = dataclasses.replace(worker.grant.settings, micro_batch=4, grad_accum=2)
    assert worker.attempt is not None
    outcome = Outcome(status=Status.MEMORY, step=5, num_samples=40, reason="full", settings=smaller)
    world.controller.finish(worker.slot_id, worker.epoch, worker.attempt, outcome)
    world.decide()
    worker.obey()
    assert worker.attempt == (T0, 1)
    assert worker.grant is not None, "it must not wait for a plan that changes"
    assert (worker.grant.settings.micro_batch, worker.grant.settings.grad_accum) == (4, 2)
    world.restart()  # from the journal
    world.decide()
    order = worker.order()
    assert order is not None
    assert order.grant is not None
    assert order.grant.settings.micro_batch == 4


@pytest.mark.parametrize("policy", ["static", "fair_share", "goodput"])
def test_a_function_that_raised_in_a_cheaper_tier_begins_again_once_in_the_start_tier(
    tmp_path: Path, policy: str
) -> None:
    world = World(tmp_path / "run", policy_name=policy)
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    assert worker.attempt is not None
    raised = Outcome(status=Status.TIER, step=5, num_samples=40, reason="it raised in bf16: TypeError: mine")
    world.controller.finish(worker.slot_id, worker.epoch, worker.attempt, raised)
    world.restart()  # from the journal
    world.decide()
    order = worker.order()
    assert order is not None
    assert order.trial is not None
    assert (order.trial.attempt, order.trial.precision_off) == (1, raised.reason)
    assert order.grant is not None
    assert order.grant.settings.tier is Tier.FP32
    trial = world.controller.run.trials[T0]
    assert trial.off == {"precision": raised.reason}
    assert decisions.snapshot(world.controller.world, world.controller.run, 0.0).trials[0].limits.tiers == (Tier.FP32,)  # type: ignore[union-attr]
    worker.obey()
    world.controller.finish(worker.slot_id, worker.epoch, (T0, 1), raised)
    assert world.controller.run.trials[T0].state is TrialState.FAILED, "nothing is tried without end"


def test_what_a_dead_attempt_says_is_refused(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    world.attach("slot-0")
    assert not worker.tell(Events(number=9))


def test_a_trial_that_kills_its_slot_again_and_again_fails_by_name(world: World) -> None:
    world.attach("slot-0")
    world.controller.submit(T0, {})
    world.controller.submit(T1, {})
    world.attach("slot-0")
    worker = world.attach("slot-0")
    trial = world.trial(T0)
    assert trial.state is TrialState.FAILED
    assert "died 2 times" in trial.reason
    order = worker.order()
    assert order is not None
    assert order.trial is not None
    assert order.trial.trial_id == T1, "the queue goes on"


def test_ranks_that_lost_each_other_fail_the_trial_with_the_reason_of_the_one_that_raised(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    raised = Outcome(status=Status.FAILED, step=3, num_samples=24, reason="ValueError: boom")
    world.controller.poison_slot("slot-0", worker.epoch, raised)
    assert world.trial(T0).state is TrialState.RUNNING, "its other ranks are still there"
    world.attach("slot-0")
    trial = world.trial(T0)
    assert (trial.state, trial.reason) == (TrialState.FAILED, "ValueError: boom")
    assert world.held() == 0.0


def test_lanes_of_a_process_close_together(world: World) -> None:
    first, second, other = (world.attach(slot_id) for slot_id in ("slot-0.0", "slot-0.1", "slot-1.0"))
    world.controller.submit(T0, {})
    world.decide()
    first.obey()
    world.clock.advance(61.0)
    world.controller.close_idle_slots()
    told = [order.op for order in (worker.order() for worker in (first, second, other)) if order is not None]
    assert told == [SlotOp.RUN, SlotOp.IDLE, SlotOp.CLOSE]
    world.controller.finish("slot-0.0", first.epoch, (T0, 0), Outcome(status=Status.DONE, step=5, num_samples=40))
    world.clock.advance(61.0)
    world.controller.close_idle_slots()
    told = [order.op for order in (worker.order() for worker in (first, second)) if order is not None]
    assert told == [SlotOp.CLOSE, SlotOp.CLOSE]


def test_a_slot_idle_for_long_is_closed_and_wanted_again_when_trials_wait(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.close_idle_slots()
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.IDLE
    world.clock.advance(61.0)
    world.controller.close_idle_slots()
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.CLOSE
    world.controller.slot_closed("slot-0")
    assert not world.wants_slot()
    world.controller.submit(T0, {})
    assert world.wants_slot()
    world.controller.expect_slot("slot-0")
    assert not world.wants_slot(), "one is on its way"
    again = world.attach("slot-0")
    order = again.order()
    assert order is not None
    assert order.op is SlotOp.RUN


def test_a_stopped_trial_is_told_and_frees_its_slot(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    world.controller.release(T0)
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.DISCARD
    worker.finish(Status.STOPPED)
    assert world.trial(T0).state is TrialState.STOPPED


def test_an_interrupted_run_lets_trials_commit_and_assigns_nothing(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.controller.submit(T1, {})
    world.decide()
    worker.obey()
    world.controller.interrupt()
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.CHECKPOINT
    worker.finish(Status.INTERRUPTED, checkpoint="/c/mid")
    idle = worker.order()
    assert idle is not None
    assert idle.op is SlotOp.IDLE
    assert world.trial(T0).checkpoint == "/c/mid"
    answer = world.ask(T0, 0)
    assert answer is not None
    assert answer.is_last


def test_an_override_is_recorded_before_any_new_grant_and_bans_the_tier(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    assert worker.grant is not None
    bf16 = Settings(share=1.0, micro_batch=8, grad_accum=1, tier=Tier.BF16, num_workers=1)
    report = OverrideReport(generation=worker.grant.generation, number=1, settings=bf16, step=3, reason="test")
    worker.tell(Events(number=1, overrides=(report,)))
    snapshot = world.snapshot()
    assert snapshot is not None
    assert snapshot.trials[0].override is not None
    assert snapshot.trials[0].override.settings.tier is Tier.BF16
    kinds = [entry["kind"] for entry in read(world.run_dir / "journal.jsonl")]
    assert kinds[-1] == "override"


def test_a_plan_that_breaks_an_invariant_is_refused_and_newcomers_are_served(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    snapshot = world.snapshot()
    assert snapshot is not None
    empty = Plan(generation=snapshot.plan.generation, allocations=(), reason="nonsense")
    assert not world.controller.accept(snapshot, empty)
    world.controller.offer()
    order = worker.order()
    assert order is not None
    assert order.grant is not None, "fair shares stand in"
    refusals = [entry for entry in read(world.run_dir / "journal.jsonl") if entry["kind"] == "refusal"]
    assert len(refusals) == 1
    assert refusals[0]["violations"]


def test_more_trials_than_smallest_shares_are_refused_once_and_wait(world: World) -> None:
    for number in range(9):  # the smallest share is an eighth
        world.attach(f"slot-{number}")
        world.controller.submit(TrialId(f"t{number}"), {})
    world.decide()
    world.decide()
    kinds = [entry["kind"] for entry in read(world.run_dir / "journal.jsonl")]
    assert (kinds.count("refusal"), kinds.count("plan")) == (1, 0)


def test_a_restarted_actor_knows_everything(world: World) -> None:
    workers = [world.attach("slot-0"), world.attach("slot-1")]
    for trial in (T0, T1, T2):
        world.controller.submit(trial, {"lr": 0.5})
        world.ask(trial, 0)
    world.decide()
    for _ in range(3):
        for worker in workers:
            worker.obey()
    workers[0].report(0)
    world.controller.release(T1)
    before = world.controller.run
    world.restart()
    after = world.controller.run
    assert after.plan == before.plan
    assert after.accounts() == before.accounts()
    assert after.queue == before.queue
    for trial_id, known in before.trials.items():
        other = after.trials[trial_id]
        assert (other.state, other.attempt, other.slot_id, other.reports, other.checkpoint, other.stop) == (
            known.state,
            known.attempt,
            known.slot_id,
            known.reports,
            known.checkpoint,
            known.stop,
        )
    assert after.changes_applied == before.changes_applied
    order = workers[0].order()
    assert order is not None
    assert order.trial is not None
    assert order.trial.trial_id == T0
    workers[0].obey()
    assert world.held() <= 1.0


def test_a_run_started_anew_puts_running_trials_back(world: World) -> None:
    worker = world.attach("slot-0")
    for trial in (T0, T1):
        world.controller.submit(trial, {})
    world.decide()
    worker.obey()
    worker.report(0)
    world.start_id = "s2"
    world.restart()
    state = world.controller.run
    assert state.queue == [T0, T1]
    assert state.trials[T0].checkpoint == "/c/0"
    assert world.held() == 0.0
    answer = world.ask(T0, 0)
    assert answer is not None, "reports already taken are answered at once"
    assert answer.report is not None
    again = world.attach("slot-0")
    assert again.epoch > worker.epoch
    order = again.order()
    assert order is not None
    assert order.trial is not None
    assert (order.trial.trial_id, order.trial.num_reports_done) == (T0, 1)


def test_a_restart_of_the_actor_after_a_new_start_does_not_forget_workers_again(world: World) -> None:
    world.attach("slot-0")
    world.controller.submit(T0, {})
    world.start_id = "s2"
    world.restart()
    worker = world.attach("slot-0")
    world.decide()
    worker.obey()
    world.restart()
    trial = world.trial(T0)
    assert trial.state is TrialState.RUNNING
    assert trial.slot_id == "slot-0"


def test_what_a_trial_measured_of_its_step_modes_is_part_of_the_decision_and_survives_the_actor(world: World) -> None:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    slow = StepModeView(tier=Tier.FP32, micro_batch=8, grad_accum=1, is_replayed=False, eager_s=0.01, replayed_s=0.02)
    fast = dataclasses.replace(slow, is_replayed=True, replayed_s=0.005)
    small = dataclasses.replace(fast, micro_batch=4)
    worker.tell(Events(number=1, modes=(slow, fast)))
    worker.tell(Events(number=2, modes=(small, small)))
    snapshot = world.snapshot()
    assert snapshot is not None
    assert snapshot.trials[0].step_modes == (small, fast), "one per dials, the newest"
    world.attach("slot-1")
    world.controller.submit(T1, {})
    world.decide()  # journalled with what was known
    world.restart()
    again = world.snapshot()
    assert again is not None
    assert again.trials[0].step_modes == (small, fast)
