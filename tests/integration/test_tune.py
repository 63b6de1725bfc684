"""Ray Tune as its users know it: schedulers and searchers over one wrapped trainable, in one control plane.

One run serves all searches, so that its slots are opened once. What Tune saw is held against what the journal has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import orchestrator.tune
from orchestrator.control.journal import read
from orchestrator.view.verify import verify
from tests.integration.runs import call, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAX_REPORTS = 4
GOOD, BAD = 0.05, 1e-5
"""Learning rates: one learns, one hardly."""


@dataclass
class Session:
    """A control plane that is open, and the directory of its run."""

    trainable: Any
    run_dir: Path
    results_dir: Path

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in read(self.run_dir / "journal.jsonl") if entry["kind"] == kind]

    def fit(self, name: str, space: dict[str, Any], **config: Any) -> Any:
        from ray import tune

        tuner = tune.Tuner(
            self.trainable,
            param_space=space,
            tune_config=tune.TuneConfig(metric="val_loss", mode="min", **config),
            run_config=tune.RunConfig(name=name, storage_path=str(self.results_dir), verbose=0),
        )
        return tuner.fit()


def own_id(result: Any) -> str:
    return f"trial-{result.metrics['trial_id'].replace('_', '-')}"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    directory = tmp_path_factory.mktemp("tune")
    changes = {"trial": {"samples_per_report": 4000, "max_reports": MAX_REPORTS, "micro_batch": 16}}
    path = run_file(directory / "run.yaml", **changes)
    with orchestrator.tune.trainable(path) as trainable:
        yield Session(trainable, directory / "runs" / "r", directory / "results")
    assert verify(directory / "runs" / "r")["violations"] == []
    ended = [entry for entry in read(directory / "runs" / "r" / "journal.jsonl") if entry["kind"] == "run_ended"]
    assert ended[-1]["leaks"] == {"actors": 0, "placement_groups": 0}
    assert ended[-1]["state"] == "done"


def asha() -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(max_t=MAX_REPORTS, grace_period=1, reduction_factor=2)


def median() -> Any:
    from ray.tune.schedulers import MedianStoppingRule

    return MedianStoppingRule(time_attr="training_iteration", grace_period=1, min_samples_required=2)


def hyperband() -> Any:
    from ray.tune.schedulers import HyperBandScheduler

    return HyperBandScheduler(max_t=MAX_REPORTS, reduction_factor=2)


@pytest.mark.parametrize("make", [asha, median, hyperband], ids=lambda make: make.__name__)
def test_a_scheduler_stops_the_worse_trials_and_lets_the_best_go_on(session: Session, make: Callable[[], Any]) -> None:
    from ray import tune

    # HyperBand's first three trials are a bracket of their own, in which none is stopped.
    rates = [0.04, 0.04, 0.04, GOOD, BAD, 2e-5] if make is hyperband else [GOOD, BAD, 0.03, 2e-5]
    space = {"lr": tune.grid_search(rates)}
    results = session.fit(make.__name__, space, scheduler=make(), reuse_actors=make is not asha)
    assert not results.errors
    seen = {own_id(result): result.metrics for result in results}
    assert len(seen) == len(rates)
    lengths = {result.config["lr"]: result.metrics["training_iteration"] for result in results}
    assert results.get_best_result().config["lr"] >= 0.03
    assert max(lengths[lr] for lr in rates if lr >= 0.03) == MAX_REPORTS
    assert min(lengths[lr] for lr in (BAD, 2e-5)) < MAX_REPORTS
    for trial_id, metrics in seen.items():
        reports = [entry for entry in session.of("result") if entry["trial_id"] == trial_id]
        assert len(reports) == metrics["training_iteration"], "nothing was trained that the search did not see"
        assert reports[-1]["metrics"]["val_loss"] == pytest.approx(metrics["val_loss"])


def test_random_optuna_and_grid_propose_and_hear_the_results(session: Session) -> None:
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    from orchestrator.tune.search import optuna_sampler

    space = {"lr": tune.loguniform(1e-4, 0.05)}
    searcher = OptunaSearch(sampler=optuna_sampler(1))
    results = session.fit("optuna", space, search_alg=searcher, num_samples=4, reuse_actors=True)
    assert not results.errors
    rates = [result.config["lr"] for result in results]
    assert len(set(rates)) == 4
    assert all(1e-4 <= rate <= 0.05 for rate in rates)
    assert {result.metrics["training_iteration"] for result in results} == {MAX_REPORTS}
    told = {trial.params["lr"]: trial.value for trial in searcher._ot_study.trials}
    assert told == {result.config["lr"]: pytest.approx(result.metrics["val_loss"]) for result in results}
    random = session.fit("random", space, num_samples=2, reuse_actors=True)
    assert {result.metrics["training_iteration"] for result in random} == {MAX_REPORTS}


@pytest.mark.parametrize("is_in_step", [True, False], ids=["in step", "as they come"])
def test_population_based_training_restores_and_perturbs(session: Session, is_in_step: bool) -> None:
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=1,
        quantile_fraction=0.34,
        resample_probability=0.0,
        hyperparam_mutations={"lr": tune.loguniform(1e-6, 0.1)},
        log_config=False,
        synch=is_in_step,
    )
    space = {"lr": tune.grid_search([GOOD, 0.03, BAD])}
    results = session.fit(f"pbt-{is_in_step}", space, scheduler=scheduler, reuse_actors=True)
    assert not results.errors
    assert {result.metrics["training_iteration"] for result in results} == {MAX_REPORTS}
    ids = {own_id(result) for result in results}
    taken = [e for e in session.of("trial_continued") if e["trial_id"] in ids and e["origin"] is not None]
    assert taken, "a trial took up the state of a better one"
    reports = session.of("result")
    queued = {entry["trial_id"]: entry["params"]["lr"] for entry in session.of("trial_queued")}
    if is_in_step:  # else the worst may begin when the others have ended, and is never compared
        assert {queued[entry["trial_id"]] for entry in taken} >= {BAD}
    for entry in taken:
        donor = [e for e in reports if e["trial_id"] == entry["origin"] and e["index"] == entry["num_reports"] - 1]
        assert entry["step"] in {e["step"] for e in donor}
        assert entry["params"]["lr"] not in {BAD, GOOD, 0.03}, "its parameters are perturbed"
        after = next(e for e in reports if e["seq"] > entry["seq"] and e["trial_id"] == entry["trial_id"])
        continued = [e for e in session.of("trial_continued") if e["trial_id"] == entry["trial_id"]]
        if any(entry["seq"] < e["seq"] < after["seq"] for e in continued):
            continue  # Tune had it go on from elsewhere before it reported
        assert after["index"] == entry["num_reports"], "it goes on behind the report of the other"
        own_before = [e for e in reports if e["seq"] < entry["seq"] and e["trial_id"] == entry["trial_id"]][-1]
        assert after["metrics"]["val_loss"] < own_before["metrics"]["val_loss"]


def test_many_waiting_trials_have_no_process(session: Session) -> None:
    import psutil
    from ray import tune

    most = 0

    class Counter(tune.Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            nonlocal most
            stand_ins = 0
            for child in psutil.Process().children(recursive=True):
                # A process may end between the listing and the question: then it holds nothing any more.
                with contextlib.suppress(psutil.NoSuchProcess):
                    stand_ins += "SlotTrial" in " ".join(child.cmdline())
            most = max(most, stand_ins)

    tuner = tune.Tuner(
        session.trainable,
        param_space={"lr": tune.loguniform(1e-4, 0.05)},
        tune_config=tune.TuneConfig(num_samples=64, reuse_actors=True),
        run_config=tune.RunConfig(
            name="many",
            storage_path=str(session.results_dir),
            verbose=0,
            callbacks=[Counter()],
            stop={"training_iteration": 1},
        ),
    )
    results = tuner.fit()
    assert len(results) == 64
    assert not results.errors
    assert 1 <= most <= 3, "two slots, and one that waits behind them"


def test_a_scheduler_that_resizes_trials_is_refused_with_the_reason(session: Session) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, ResourceChangingScheduler

    def grow(controller: Any, trial: Any, result: Any, scheduler: Any) -> Any:
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001, "memory": 1000}])

    scheduler = ResourceChangingScheduler(ASHAScheduler(max_t=MAX_REPORTS), resources_allocation_function=grow)
    results = session.fit("resized", {"lr": GOOD}, scheduler=scheduler)
    (error,) = results.errors
    assert "ResourceChangingScheduler cannot work with trials in slots" in str(error)
    assert "dials.share" in str(error)


def test_a_search_that_was_cut_off_is_restored(session: Session, tmp_path: Path) -> None:
    from ray import tune

    armed = tmp_path / "armed"
    armed.touch()

    class Cut(tune.Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            if result["training_iteration"] == 2 and armed.exists():
                raise RuntimeError("cut off by the test")

    space = {"lr": tune.grid_search([GOOD, 0.01])}
    run_config = tune.RunConfig(name="cut", storage_path=str(session.results_dir), verbose=0, callbacks=[Cut()])
    with pytest.raises(Exception, match="cut off"):
        tune.Tuner(session.trainable, param_space=space, run_config=run_config).fit()
    path = session.results_dir / "cut"
    armed.unlink()
    results = tune.Tuner.restore(str(path), trainable=session.trainable, resume_errored=True).fit()
    assert not results.errors
    assert [result.metrics["training_iteration"] for result in results] == [MAX_REPORTS] * 2
    for result in results:
        reports = [entry for entry in session.of("result") if entry["trial_id"] == own_id(result)]
        assert [entry["index"] for entry in reports] == list(range(MAX_REPORTS)), "no report was made twice"


def test_a_second_session_on_the_same_run_is_refused(session: Session, tmp_path: Path) -> None:
    config = yaml.safe_load((session.run_dir / "run.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    with (
        pytest.raises(Exception, match=r"exists already"),
        orchestrator.tune.trainable(tmp_path / "again.yaml"),
    ):
        pass


def test_the_status_of_the_run_is_that_of_a_run(session: Session) -> None:
    status = json.loads((session.run_dir / "status.json").read_text())
    assert status["state"] == "running"
    assert {slot["state"] for slot in status["slots"]} <= {"idle", "running", "opening", "closed"}


def test_a_run_that_perturbs_is_stopped_and_resumed_where_it_was(tmp_path: Path) -> None:
    changes = {
        "search": {
            "space": {"lr": {"choice": [GOOD, 0.03, BAD]}},
            "num_trials": 4,
            "max_concurrent": 2,
            "scheduler": {"name": "pbt", "quantile": 0.34},
        },
        "trial": {"samples_per_report": 16000, "max_reports": MAX_REPORTS, "micro_batch": 16},
    }
    run = start("run", str(run_file(tmp_path / "run.yaml", **changes)), run_dir=tmp_path / "runs" / "r")
    run.wait_until(lambda: len(run.of("result")) >= 4, "some reports")
    stopped = call("stop", str(run.run_dir))
    assert stopped.returncode == 0, stopped.stderr
    code, output = run.end()
    assert code == 130, output
    resumed = start("resume", str(run.run_dir), run_dir=run.run_dir)
    code, output = resumed.end()
    assert code == 0, output
    assert verify(run.run_dir)["violations"] == []
    assert len(run.status["trials"]) == 4, "Tune took up its trials and proposed no others"
    assert {trial["state"] for trial in run.status["trials"]} == {"done"}
    assert run.of("trial_paused"), "with four trials for two slots and a spare stand-in some were put aside"
