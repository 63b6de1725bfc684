"""What a live run tells a policy of the search: chances from scripted reports, under each scheduler of the run file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from orchestrator.config.model import (
    AshaScheduler,
    FifoScheduler,
    HyperbandScheduler,
    MedianScheduler,
    PbtScheduler,
    Scheduler,
)
from orchestrator.control.journal import FILE_NAME, read
from orchestrator.control.orders import Status
from orchestrator.control.spec import RunSpec, StopRule
from orchestrator.policies.codec import snapshot_from, to_jsonable
from orchestrator.policies.learn.survival import MOST
from orchestrator.policies.plan import TrialId
from orchestrator.policies.simulator import Job
from orchestrator.policies.simulator.search import AshaSearch, SearchSpec, loss_of
from orchestrator.policies.snapshot import TrialView
from orchestrator.run_spec import stop_rule
from orchestrator.view.explain import explain, render
from tests.unit.orchestrator.control.worlds import Worker, World

ASHA = AshaScheduler(name="asha", grace_reports=1, reduction_factor=2)
HYPERBAND = HyperbandScheduler(name="hyperband", reduction_factor=2)
MEDIAN = MedianScheduler(name="median", grace_reports=1, min_trials=3)
PBT = PbtScheduler(name="pbt", interval_reports=4, quantile=0.25)
STOPPING: tuple[Scheduler, ...] = (ASHA, HYPERBAND, MEDIAN, PBT)


class Run:
    """Trials t0, t1 ... each in a slot of its own."""

    def __init__(self, run_dir: Path, scheduler: Scheduler, num_trials: int, mode: str = "min") -> None:
        params = {"objective": "search"}
        rule = stop_rule(scheduler)
        self.world = World(run_dir, "goodput_joint", policy_params=params, stop_rule=rule, mode=mode)
        self.workers: list[Worker] = []
        for index in range(num_trials):
            self.add(index)

    def add(self, index: int) -> None:
        self.workers.append(self.world.attach(f"slot-{index}"))
        self.world.controller.submit(TrialId(f"t{index}"), {"lr": index})
        self.world.decide()
        for worker in self.workers:
            worker.obey()

    def report(self, index: int, *losses: float | None) -> None:
        """Report `index` of each trial; None for one that makes none."""
        for worker, loss in zip(self.workers, losses, strict=False):
            if loss is not None:
                worker.report(index, loss)

    def views(self) -> dict[str, TrialView]:
        snapshot = self.world.snapshot()
        assert snapshot is not None
        return {str(trial.trial_id): trial for trial in snapshot.trials}

    def chances(self) -> list[float | None]:
        return [view.survival for _, view in sorted(self.views().items())]


def known(chances: list[float | None]) -> list[float]:
    found = [each for each in chances if each is not None]
    assert len(found) == len(chances)
    return found


@pytest.mark.parametrize("scheduler", STOPPING, ids=lambda each: each.name)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_better_trial_has_the_better_chance_and_a_newcomer_none_yet(
    tmp_path: Path, scheduler: Scheduler, mode: str
) -> None:
    run = Run(tmp_path / "run", scheduler, 5, mode)
    assert run.chances() == [None] * 5
    sign = 1 if mode == "min" else -1
    run.report(0, *(sign * loss for loss in (1.0, 2.0, 3.0, 4.0)))
    *reported, newcomer = run.chances()
    assert newcomer is None
    chances = known(reported)
    assert chances == sorted(chances, reverse=True)
    assert 0 < chances[-1] < 0.5 < chances[0] < 1
    assert all(view.loss is not None for view in run.views().values())


@pytest.mark.parametrize("scheduler", STOPPING, ids=lambda each: each.name)
def test_a_restarted_actor_says_the_same_and_nobody_is_a_newcomer_twice(tmp_path: Path, scheduler: Scheduler) -> None:
    run = Run(tmp_path / "run", scheduler, 4)
    run.report(0, 1.0, 2.0, float("nan"), 4.0)
    run.workers[0].finish(Status.DONE)
    run.world.decide()
    before = run.views()
    run.world.restart()
    after = run.views()
    for name, view in before.items():
        assert (after[name].survival, after[name].rung_samples) == (view.survival, view.rung_samples)
        assert after[name].loss == view.loss is not None


def test_after_a_rung_a_live_trial_and_a_simulated_one_have_the_same_chance(tmp_path: Path) -> None:
    spec = SearchSpec(application="toy", max_reports=16, reduction_factor=2)
    simulated, jobs = AshaSearch(spec), []
    for index in range(4):
        submission = SimpleNamespace(name=f"trial-{index}")
        jobs.append(cast(Job, SimpleNamespace(submission=submission, progress=1 / 16, length=16 * 800)))
        simulated.reached(jobs[-1], 0.0)
    run = Run(tmp_path / "run", ASHA, 4)
    run.report(0, *(loss_of(job.submission.name, 1, spec) for job in jobs))
    live = [(view.survival, view.rung_samples) for _, view in sorted(run.views().items())]
    assert live == [simulated.outlook(job)[:2] for job in jobs]


def test_trials_that_ended_still_count(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ASHA, 4)
    run.report(0, 1.0, 2.0, 3.0, 4.0)
    before = run.chances()
    for worker in run.workers[1:]:
        worker.finish(Status.STOPPED)
    assert run.chances() == before[:1]


def test_between_rungs_the_newest_reports_count_once_there_are_enough(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", AshaScheduler(name="asha", grace_reports=1, reduction_factor=3), 6)
    run.report(0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    at_rung = run.chances()
    run.report(1, 9.0, 1.0)
    assert run.chances() == at_rung  # two are too few to say who is the best third
    run.report(1, None, None, 2.0)
    first, second, third, *rest = run.chances()
    assert known([second])[0] > known([third])[0] > known([first])[0]
    assert rest == at_rung[3:]


def test_before_the_first_rung_trials_stand_where_their_reports_are(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", AshaScheduler(name="asha", grace_reports=2, reduction_factor=2), 3)
    run.report(0, 2.0, 1.0)
    first, second, third = run.chances()
    assert third is None
    assert known([second])[0] > known([first])[0]


def test_behind_the_last_rung_nothing_is_left_to_survive(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", AshaScheduler(name="asha", grace_reports=1, reduction_factor=15), 2)
    for index in range(15):
        run.report(index, 1.0)
    best, other = run.views().values()
    assert (best.survival, best.rung_samples) == (None, None)
    assert (other.survival, other.rung_samples) == (None, 800)


def test_a_median_of_too_few_stops_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", MEDIAN, 4)
    run.report(0, 1.0, 2.0, 3.0)
    assert run.chances() == [MOST, MOST, MOST, None]
    run.report(0, None, None, None, 4.0)
    assert known(run.chances())[-1] < 0.1


def test_the_median_rule_forgives_a_bad_report_of_a_trial_that_was_good(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", MEDIAN, 5)
    run.report(0, 1.0, 2.0, 3.0, 4.0, 5.0)
    run.report(1, 9.0, 2.0, 3.0, 4.0, 5.0)
    assert known(run.chances())[0] > 0.9


def test_a_population_of_one_keeps_its_state(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", PBT, 1)
    run.report(0, 1.0)
    (view,) = run.views().values()
    assert (view.survival, view.rung_samples) == (MOST, 4 * 800)


def test_where_nobody_is_stopped_there_is_no_chance_to_name(tmp_path: Path) -> None:
    assert stop_rule(FifoScheduler(name="fifo")) is None
    world = World(tmp_path / "run")
    worker = world.attach("slot-0")
    world.controller.submit(TrialId("t0"), {})
    world.decide()
    worker.obey()
    worker.report(0, 1.0)
    snapshot = world.snapshot()
    assert snapshot is not None
    assert snapshot.trials[0].survival is None
    assert "survival" not in to_jsonable(snapshot)["trials"][0]


def test_a_decision_is_taken_with_the_chances_that_its_journal_says_and_can_be_taken_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ASHA, 4)
    run.report(0, 1.0, 2.0, 3.0, 4.0)
    for _ in range(8):
        run.world.clock.advance(60.0)
        for worker in run.workers:
            assert worker.grant is not None
            worker.obey(num_steps=20, step_s=0.005 / worker.grant.settings.share)
        run.world.decide()
    entries = [entry for entry in read(tmp_path / "run" / FILE_NAME) if entry["kind"] == "plan"]
    told = [[trial.get("survival") for trial in entry["snapshot"]["trials"]] for entry in entries]
    assert told[-1] == run.chances()
    for entry in entries:
        assert to_jsonable(run.world.policy.decide(snapshot_from(entry["snapshot"]))) == entry["plan"]
    shares = {row["trial_id"]: row["settings"]["share"] for row in entries[-1]["plan"]["allocations"]}
    assert shares["t0"] >= shares["t1"] > shares["t3"]
    answer = explain(tmp_path / "run", entries[-1]["generation"])
    assert {item["survival"] for item in answer["trials"]} <= set(told[-1])
    assert "chance to survive its next rung 0." in render(answer)


def test_the_rule_is_in_the_journal_and_older_ones_have_none(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", MEDIAN, 1)
    spec = run.world.spec
    assert RunSpec.from_jsonable(spec.to_jsonable()) == spec
    assert spec.stop_rule == StopRule(name="median", grace_reports=1, min_trials=3)
    older = {key: value for key, value in spec.to_jsonable().items() if key != "stop_rule"}
    assert RunSpec.from_jsonable(older).stop_rule is None
