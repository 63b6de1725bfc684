"""Several runs under one policy: one snapshot, no device over-committed between them, a journal for each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.clock import ManualClock
from orchestrator.control.grants import held
from orchestrator.control.orders import SlotOp
from orchestrator.control.spec import RunSpec
from orchestrator.control.terms import Terms
from orchestrator.control.together import Together
from orchestrator.control.world import TrialState
from orchestrator.policies import build_policy
from orchestrator.policies.plan import Plan, TrialId
from orchestrator.policies.snapshot import Snapshot
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.states import durable_state
from tests.unit.orchestrator.control.worlds import DEVICE, Worker, World

T0, T1 = TrialId("t0"), TrialId("t1")


class RunOf(World):
    """A run of several: its trials have a prefix."""

    prefix = ""

    @property
    def spec(self) -> RunSpec:
        return replace(super().spec, run_id=self.run_dir.name, prefix=self.prefix, params={"depth": 2, "secret": 7})


class Cluster:
    """Runs that share a device and a policy."""

    def __init__(self, directory: Path, policy: str = "fair_share") -> None:
        self.directory, self.policy_name = directory, policy
        self.policy = build_policy(policy, {})
        self.clock = ManualClock(100.0)
        self.together = Together()
        self.runs: list[RunOf] = []

    def begin(self, name: str, terms: Terms | None = None, *, places: bool = False) -> RunOf:
        prefix = f"r{len(self.runs) + 1}/"
        kind = type("Named", (RunOf,), {"prefix": prefix})
        run: RunOf = kind(
            self.directory / name, self.policy_name, clock=self.clock, terms=terms or Terms(), places=places
        )
        self.runs.append(run)
        self.together.join(run.controller)
        return run

    def decide(self) -> None:
        scene = self.together.scene()
        if scene is not None:
            self.together.accept(scene, self.policy.decide(scene.snapshot))
        self.together.offer()

    def held(self) -> float:
        return sum(held(run.controller.run.accounts(), DEVICE.device_id) for run in self.runs)

    def shares(self) -> dict[str, float]:
        plans = ((run, row) for run in self.runs for row in run.controller.run.plan.allocations)
        return {f"{run.run_dir.name}:{row.trial_id}": row.settings.share for run, row in plans}


def started(run: RunOf, *trials: TrialId) -> list[Worker]:
    workers = [run.attach(f"slot-{number}") for number in range(len(trials))]
    for trial_id in trials:
        run.controller.submit(trial_id, {"lr": 0.1})
    return workers


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_trials_of_two_runs_are_decided_together_whatever_they_are_called(cluster: Cluster) -> None:
    one, two = cluster.begin("one"), cluster.begin("two")
    workers = [*started(one, T0, T1), *started(two, T0)]
    for _ in range(3):
        cluster.decide()
        for worker in workers:
            worker.obey()
        assert cluster.held() <= 1.0 + 1e-9
    assert cluster.shares() == pytest.approx({"one:t0": 1 / 3, "one:t1": 1 / 3, "two:t0": 1 / 3})
    assert all(worker.step for worker in workers)


def test_a_run_that_joins_gets_its_part_only_after_others_have_given_it_back(cluster: Cluster) -> None:
    one = cluster.begin("one")
    (first,) = started(one, T0)
    cluster.decide()
    first.obey()
    assert cluster.held() == 1.0
    two = cluster.begin("two", Terms(user="bert", weight=3.0))
    (second,) = started(two, T0)
    cluster.decide()
    second.obey()
    assert second.grant is None, "the other trial has not given anything back yet"
    assert cluster.held() == 1.0
    first.obey()
    cluster.together.offer()
    second.obey()
    assert second.grant is not None
    assert (first.grant and first.grant.settings.share, second.grant.settings.share) == (0.25, 0.75)
    assert cluster.held() == 1.0


def test_what_a_run_held_is_free_when_it_leaves(cluster: Cluster) -> None:
    one, two = cluster.begin("one"), cluster.begin("two")
    first, second = *started(one, T0), *started(two, T0)
    for _ in range(2):
        cluster.decide()
        for worker in (first, second):
            worker.obey()
    first.finish()
    cluster.together.leave("r1/")
    scene = cluster.together.scene()
    assert scene is not None
    assert scene.snapshot.plan.allocation(TrialId("r1/t0")) is not None, "the policy sees that it has gone"
    cluster.decide()
    second.obey()
    assert second.grant is not None
    assert second.grant.settings.share == 1.0


def test_each_run_verifies_by_itself_and_says_nothing_of_the_other(cluster: Cluster) -> None:
    one = cluster.begin("one", Terms(user="anna"))
    two = cluster.begin("two", Terms(user="bert"))
    workers = [*started(one, T0, T1), *started(two, T0)]
    for _ in range(4):
        cluster.decide()
        for worker in workers:
            worker.obey()
    for worker in workers:
        worker.finish()
    for run in cluster.runs:
        run.flush()
        answer = verify(run.run_dir)
        assert answer["violations"] == []
        assert answer["checked"]["plans_replayed"] == answer["checked"]["plans"] > 0
    lines = (two.run_dir / "journal.jsonl").read_text().splitlines()
    text = "\n".join(line for line in lines if json.loads(line)["kind"] != "run")
    plans = "\n".join(line for line in lines if json.loads(line)["kind"] == "plan")
    assert "r1/t0" in plans, "the whole decision is there"
    assert "anna" not in text
    assert str(one.run_dir) not in text
    assert "secret" not in plans


def test_a_restarted_run_has_its_part_of_the_plans(cluster: Cluster) -> None:
    one, two = cluster.begin("one"), cluster.begin("two")
    workers = [*started(one, T0), *started(two, T0)]
    for _ in range(2):
        cluster.decide()
        for worker in workers:
            worker.obey()
    before = durable_state(two.controller.world, two.controller.run)
    two.flush()
    cluster.together.leave("r2/")
    two.restart()
    cluster.together.join(two.controller)
    found = durable_state(two.controller.world, two.controller.run)
    assert found["plan"] == before["plan"]
    assert found["trials"]["t0"]["line"]["applied"] == before["trials"]["t0"]["line"]["applied"]
    cluster.decide()
    for worker in workers:
        worker.obey()
    assert cluster.held() <= 1.0 + 1e-9


def test_a_quota_counts_the_trials_of_a_user_in_all_runs(cluster: Cluster) -> None:
    for name in ("one", "two"):
        started(cluster.begin(name, Terms(user="anna", max_devices=2.0)), T0)
    scene = cluster.together.scene()
    assert scene is not None
    (quota,) = scene.snapshot.quotas
    assert {trial.user for trial in scene.snapshot.trials} == {quota.user}
    assert quota.user != "anna"


def test_a_trial_begins_only_where_the_smallest_shares_of_all_runs_fit(cluster: Cluster) -> None:
    one, two = cluster.begin("one"), cluster.begin("two")
    for run in cluster.runs:
        spec = run.controller.run.spec
        run.controller.run.spec = replace(spec, limits=replace(spec.limits, min_share=0.5))
    first, second = *started(one, T0), *started(two, T0, T1)[:1]
    states = [two.trial(each).state for each in (T0, T1)]
    assert states == [TrialState.RUNNING, TrialState.QUEUED], "a third half has no room"
    cluster.decide()
    for worker in (first, second):
        worker.obey()
    first.finish()
    two.controller.settle()
    assert two.trial(T1).state is TrialState.RUNNING


class Broken:
    """A policy that gives everybody everything."""

    def decide(self, snapshot: Snapshot) -> Plan:
        plan = build_policy("fair_share", {}).decide(snapshot)
        rows = [replace(row, settings=replace(row.settings, share=1.0)) for row in plan.allocations]
        return replace(plan, allocations=tuple(rows))


def test_while_the_policy_is_refused_all_runs_share_fairly(cluster: Cluster) -> None:
    one, two = cluster.begin("one"), cluster.begin("two")
    workers = [*started(one, T0), *started(two, T0)]
    cluster.policy = Broken()
    for _ in range(2):
        cluster.decide()
        for worker in workers:
            worker.obey()
    assert cluster.shares() == {"one:t0": 0.5, "two:t0": 0.5}
    for run in cluster.runs:
        run.flush()
        assert verify(run.run_dir)["violations"] == []


def test_trials_of_one_shape_share_what_is_measured_in_whichever_run(cluster: Cluster) -> None:
    one, two = cluster.begin("one"), cluster.begin("two")
    workers = [*started(one, T0), *started(two, T0)]
    for _ in range(2):
        cluster.decide()
        for worker in workers:
            worker.obey()
    scene = cluster.together.scene()
    assert scene is not None
    assert len({trial.shape for trial in scene.snapshot.trials}) == 1
    assert "depth" not in scene.snapshot.trials[0].shape
    assert one.trial(T0).state is two.trial(T0).state is TrialState.RUNNING


@pytest.mark.parametrize("policy", ["fluid", "tiresias", "goodput_joint"])
def test_trials_of_two_runs_take_turns_on_one_device_and_all_end(tmp_path: Path, policy: str) -> None:
    cluster = Cluster(tmp_path, policy)
    for name in ("one", "two"):
        cluster.begin(name, places=True)
    workers = [worker for run in cluster.runs for worker in started(run, T0, T1)]
    for _ in range(300):
        cluster.clock.advance(0.05)
        cluster.decide()
        for worker in workers:
            train(worker)
            assert cluster.held() <= 1.0 + 1e-9
        trials = [trial for run in cluster.runs for trial in run.controller.run.trials.values()]
        if all(trial.state.is_final for trial in trials):
            break
    assert [trial.state for trial in trials] == [TrialState.DONE] * 4
    for run in cluster.runs:
        run.flush()
        answer = verify(run.run_dir)
        assert answer["violations"] == []
        assert answer["checked"]["plans_replayed"] == answer["checked"]["plans"]


def train(worker: Worker) -> None:
    """What a worker group does about its newest order: some steps, a report when it is due, or leave."""
    order, run = worker.order(), worker.world.controller.run
    if order is None or order.op is not SlotOp.RUN or order.trial is None:
        return
    worker.obey()
    if worker.leave() or worker.grant is None:
        return
    trial = worker.world.trial(order.trial.trial_id)
    if worker.position >= (len(trial.reports) + 1) * run.spec.samples_per_report:
        worker.world.controller.want(trial.trial_id, len(trial.reports))
        worker.report(len(trial.reports))
        if len(trial.reports) == run.spec.max_reports:
            worker.finish()
