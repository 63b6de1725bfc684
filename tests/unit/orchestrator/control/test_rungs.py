"""In which order the search is told of reports that reach a rung together, and how long one waits for the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.journal import FILE_NAME, read
from orchestrator.control.orders import Status, StopMode
from orchestrator.control.spec import StopRule
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import TrialId
from orchestrator.policies.simulator.search import stops
from orchestrator.telemetry.store import read_table
from orchestrator.telemetry.tables import TableKind
from tests.unit.orchestrator.control.worlds import Worker, World

STRETCH_S = 8.0
PATIENCE = 0.25
LATEST_S = PATIENCE * STRETCH_S


def asha(factor: int = 2, patience: float = PATIENCE) -> StopRule:
    return StopRule(name="asha", grace_reports=1, reduction_factor=factor, rung_patience=patience)


@dataclass
class Search:
    """Asks for the reports of its trials as Tune's stand-ins do, and judges each as ASHA does."""

    world: World
    factor: int = 2
    workers: dict[TrialId, Worker] = field(default_factory=dict)
    told: list[TrialId] = field(default_factory=list)
    passed: list[TrialId] = field(default_factory=list)
    judged: dict[int, list[float]] = field(default_factory=dict)

    def begin(self, *names: str) -> None:
        for name in names:
            trial_id = TrialId(name)
            self.workers[trial_id] = self.world.attach(f"slot-{name}")
            self.world.controller.submit(trial_id, {})
            self.world.ask(trial_id, 0)
        self.world.decide()
        for worker in self.workers.values():
            worker.obey(0)  # no step yet, so that no pace is known

    def train(self, name: str, num_steps: int, step_s: float) -> None:
        """Steps of 8 samples, of which a report takes 100."""
        self.workers[TrialId(name)].obey(num_steps, step_s)

    def report(self, name: str, loss: float, index: int = 0) -> None:
        self.workers[TrialId(name)].report(index, loss)

    def ask(self, name: str, index: int = 0) -> bool:
        """Whether the search is told of that report now; a trial that is told is judged at once."""
        trial_id = TrialId(name)
        answer = self.world.ask(trial_id, index)
        if answer is None or answer.report is None:
            return False
        self.told.append(trial_id)
        recorded, loss = self.judged.setdefault(index, []), answer.report.metrics["val_loss"]
        is_worse = stops(recorded, loss, self.factor)
        recorded.append(loss)
        if is_worse:
            self.world.controller.release(trial_id)
        else:
            self.passed.append(trial_id)
            self.world.ask(trial_id, index + 1)
        return True

    def ask_woken(self, index: int = 0) -> None:
        """Ask for those that the actor wakes, until it wakes nobody who was not told."""
        while True:
            _, woken = self.world.take_changes()
            if not [name for name in sorted(woken) if name not in self.told and self.ask(name, index)]:
                return


def search(path: Path, factor: int = 2, patience: float = PATIENCE) -> Search:
    return Search(World(path / "run", stop_rule=asha(factor, patience)), factor)


def at_their_rung(path: Path, factor: int = 2, **losses: float) -> Search:
    """A search whose trials began together and have reported in this order; nobody was told yet."""
    found = search(path, factor)
    found.begin(*sorted(losses))
    found.world.clock.advance(STRETCH_S)
    for name, loss in losses.items():
        found.report(name, loss)
    return found


def waiting(path: Path) -> Search:
    """Trial b waits for a."""
    found = search(path)
    found.begin("a", "b")
    found.world.clock.advance(STRETCH_S)
    found.report("b", 2.0)
    assert not found.ask("b")
    return found


def anew(found: Search, start_id: str) -> Search:
    """The same search, when the whole run was started again."""
    found.world.start_id = start_id
    found.world.restart()
    return Search(found.world)


def test_a_trial_that_diverged_and_came_first_does_not_pass(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a", "b", "c", "d")
    found.world.clock.advance(STRETCH_S)
    for name, loss in (("c", 2.34), ("b", 1.09), ("a", 1.03), ("d", 2.31)):
        found.report(name, loss)
        found.world.clock.advance(0.3)
        found.ask_woken()
    assert found.told == ["a", "d", "c", "b"]
    assert found.passed == ["a", "b"]


def test_without_patience_they_are_told_as_they_come(tmp_path: Path) -> None:
    found = search(tmp_path, patience=0.0)
    found.begin("a", "b")
    found.world.clock.advance(STRETCH_S)
    found.report("b", 2.0)
    assert found.ask("b")
    found.report("a", 1.0)
    assert found.ask("a")
    assert found.passed == ["b", "a"]


def test_a_report_waits_no_longer_than_its_patience(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a", "b")
    began_s = found.world.clock.now_s()
    found.world.clock.advance(STRETCH_S)
    found.report("b", 2.0)
    assert not found.ask("b")
    assert "waits at its rung for others" in found.world.shown()
    waits_s = PATIENCE * (found.world.clock.now_s() - began_s)
    found.world.clock.advance(0.9 * waits_s)
    assert not found.ask("b")
    found.world.clock.advance(0.2 * waits_s)
    found.ask_woken()
    assert found.told == ["b"]
    assert "waits at its rung" not in found.world.shown()
    entry = next(entry for entry in read(found.world.run_dir / FILE_NAME) if entry["kind"] == "told")
    assert (entry["trial_id"], entry["place"]) == ("b", 0)
    assert entry["held_s"] == pytest.approx(1.1 * waits_s, rel=0.1)


def test_nobody_waits_for_a_trial_that_began_later_or_has_left(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a", "b")
    found.world.clock.advance(2 * LATEST_S)
    found.begin("c")
    found.world.clock.advance(STRETCH_S)
    found.workers[TrialId("b")].finish(Status.FAILED, "its data is gone")
    found.report("a", 2.0)
    assert found.ask("a")


@pytest.mark.parametrize(("num_steps", "waits"), [(90, True), (50, False)])
def test_a_trial_whose_pace_is_known_is_waited_for_if_that_brings_it_in_time(
    tmp_path: Path, num_steps: int, waits: bool
) -> None:
    """Behind 8 s one has a tenth of its way left, the other half of it; 2 s are waited at most."""
    found = search(tmp_path)
    found.begin("a", "b")
    step_s = STRETCH_S / num_steps
    found.train("b", num_steps, step_s)
    found.report("a", 1.0)
    assert found.ask("a") is not waits


def test_who_is_about_to_come_is_waited_for_whenever_it_began(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a")
    found.world.clock.advance(STRETCH_S)
    found.begin("b")
    found.train("b", 99, 0.01)
    found.report("a", 2.0)
    assert not found.ask("a")
    found.report("b", 1.0)
    found.ask_woken()
    assert found.told == ["b", "a"]


def test_the_next_is_told_when_the_one_before_was_judged_or_has_kept_silent_for_long(tmp_path: Path) -> None:
    found = at_their_rung(tmp_path, c=3.0, b=2.0, a=1.0)
    world = found.world
    assert [world.ask(TrialId(name), 0) is None for name in "cba"] == [True, True, False]
    assert world.ask(TrialId("c"), 0) is None, "the search has not said what becomes of the best"
    world.ask(TrialId("a"), 1)
    assert TrialId("c") in world.take_changes()[1]
    assert world.ask(TrialId("c"), 0) is not None
    assert world.ask(TrialId("b"), 0) is None
    found.world.clock.advance(2.1)
    assert world.ask(TrialId("b"), 0) is not None


def test_who_comes_while_others_are_told_is_told_behind_them(tmp_path: Path) -> None:
    found = search(tmp_path)
    world = found.world
    found.begin("a", "b", "c")
    found.world.clock.advance(STRETCH_S)
    found.report("b", 2.0)
    found.report("c", 3.0)
    found.world.clock.advance(STRETCH_S)
    assert world.ask(TrialId("b"), 0) is not None
    found.report("a", 1.0)
    world.ask(TrialId("b"), 1)
    assert world.ask(TrialId("a"), 0) is None
    assert world.ask(TrialId("c"), 0) is not None
    world.controller.release(TrialId("c"))
    assert world.ask(TrialId("a"), 0) is not None


def test_a_report_that_was_told_is_told_again_to_whoever_asks_again(tmp_path: Path) -> None:
    found = at_their_rung(tmp_path, a=1.0, b=2.0)
    found.ask_woken()
    assert len(found.told) == 2
    for name in ("a", "b"):
        assert found.world.ask(TrialId(name), 0) is not None


def test_who_is_stopped_while_it_waits_holds_nobody_up(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a", "b", "c")
    found.world.clock.advance(STRETCH_S)
    found.report("a", 1.0)
    found.report("b", 2.0)
    assert not found.ask("b")
    found.world.controller.release(TrialId("a"))
    found.world.controller.stop_trial(TrialId("c"), StopMode.DISCARD)
    found.world.clock.advance(0.3)
    assert found.ask("b")


def test_who_was_stopped_while_it_waited_keeps_later_ones_from_nothing(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a")
    found.world.clock.advance(STRETCH_S)
    found.report("a", 1.0)
    found.world.controller.release(TrialId("a"))
    found.world.take_changes()  # nobody is there to ask
    found.world.clock.advance(STRETCH_S)
    found.begin("c", "d")
    found.world.clock.advance(STRETCH_S)
    found.report("c", 3.0)
    assert not found.ask("c"), "the other is waited for as ever"
    found.report("d", 2.0)
    found.ask_woken()
    assert found.told == ["d", "c"]
    assert found.passed == ["d"]


def test_an_interrupted_run_lets_nobody_wait(tmp_path: Path) -> None:
    found = waiting(tmp_path)
    found.world.controller.interrupt()
    assert found.world.ask(TrialId("b"), 0) is not None


def test_a_restarted_actor_tells_what_waited(tmp_path: Path) -> None:
    found = waiting(tmp_path)
    found.world.restart()
    assert not found.ask("b"), "it goes on waiting for the others"
    found.world.clock.advance(LATEST_S)
    assert found.ask("b")


def test_a_search_that_is_started_anew_judges_as_it_did_the_first_time(tmp_path: Path) -> None:
    """Told in any other order, a trial that had passed would be stopped, and what it has trained would be lost."""
    found = at_their_rung(tmp_path, a=1.0, b=2.0, c=3.0, d=4.0)
    found.ask_woken()
    assert (found.told, found.passed) == (["a", "c", "d", "b"], ["a", "b"])
    for start in ("s2", "s3"):
        again = anew(found, start)
        for _ in range(4):
            for name in "dbca":
                if name not in again.told:
                    again.ask(name)
        assert (again.told, again.passed) == (["a", "c", "d", "b"], ["a", "b"])


def test_a_search_that_is_started_anew_waits_for_nobody_for_long(tmp_path: Path) -> None:
    found = at_their_rung(tmp_path, a=1.0, b=2.0)
    found.ask_woken()
    again = anew(found, "s2")
    assert not again.ask("b"), "it was told behind the other"
    found.world.clock.advance(9.0)
    assert not again.ask("b")
    found.world.clock.advance(2.0)
    assert again.ask("b")


def test_those_that_come_back_do_not_each_wait_for_one_that_does_not(tmp_path: Path) -> None:
    found = at_their_rung(tmp_path, a=0.0, b=1.0, c=2.0, d=3.0, e=4.0, f=5.0)
    found.ask_woken()
    others = found.told[1:]
    again = anew(found, "s2")
    for _ in range(24):
        for name in others:
            if name not in again.told:
                again.ask(name)
        found.world.clock.advance(0.5)
    assert again.told == others, "in the order of before, after one wait"


def test_a_report_that_only_the_journal_had_when_the_actor_died_is_in_the_table_too(tmp_path: Path) -> None:
    found = at_their_rung(tmp_path, a=1.0, b=2.0)
    found.world.restart()
    for name, loss in (("a", 1.0), ("b", 2.0)):
        found.report(name, loss)
    world = found.world
    world.flush()
    rows = read_table(Path(found.world.spec.run_dir) / "telemetry", TableKind.RESULTS).table.to_pylist()
    assert [(row["trial_id"], row["index"]) for row in rows] == [("a", 0), ("b", 0)]
    assert [len(trial.reports) for trial in world.controller.run.trials.values()] == [1, 1]


def test_where_a_rung_has_judged_others_what_they_were_counts(tmp_path: Path) -> None:
    """Behind a poor first one more pass than one in two; still it makes no difference who came first."""
    outcomes = set()
    for number, order in enumerate(permutations((1.0, 1.5, 1.6))):
        found = search(tmp_path / str(number))
        found.begin("x")
        found.world.clock.advance(STRETCH_S)
        found.report("x", 3.0)
        found.ask_woken()
        found.begin("a", "b", "c")
        found.world.clock.advance(STRETCH_S)
        names = {1.0: "a", 1.5: "b", 1.6: "c"}
        for loss in order:
            found.report(names[loss], loss)
        found.ask_woken()
        outcomes.add(tuple(sorted(found.passed)))
    assert outcomes == {("a", "b", "c", "x")}


def test_a_trial_that_fails_while_its_report_waits_has_failed_for_the_search_too(tmp_path: Path) -> None:
    found = search(tmp_path)
    world = found.world
    found.begin("a", "b")
    found.world.clock.advance(STRETCH_S)
    found.report("a", 1.0)
    found.workers[TrialId("a")].finish(Status.FAILED, "its data is gone")
    answer = world.ask(TrialId("a"), 0)
    assert answer is not None
    assert not answer.is_last
    answer = world.ask(TrialId("a"), 1)
    assert answer is not None
    assert (answer.state, answer.report, answer.reason) == (TrialState.FAILED, None, "its data is gone")


def test_a_rung_that_has_judged_enough_keeps_nobody_waiting(tmp_path: Path) -> None:
    found = at_their_rung(tmp_path, a=0.0, b=1.0, c=2.0, d=3.0)
    found.ask_woken()
    assert len(found.told) == 4
    found.begin("e", "f")
    found.world.clock.advance(STRETCH_S)
    found.report("f", 0.5)
    assert found.ask("f")


def test_a_report_between_two_rungs_is_told_at_once_and_so_is_one_that_has_no_loss(tmp_path: Path) -> None:
    found = search(tmp_path)
    found.begin("a", "b")
    for index in (0, 1, 2):
        found.world.clock.advance(STRETCH_S)
        found.report("a", 1.0, index)
        found.world.clock.advance(STRETCH_S)
        assert found.ask("a", index)
    found.report("b", float("nan"))
    assert found.ask("b"), "the worst there is, and nobody else is there to be told first"


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("num_trials", [2, 3, 4, 5])
def test_in_whatever_order_they_come_one_in_so_many_passes(tmp_path: Path, factor: int, num_trials: int) -> None:
    """At most one in `factor`, the best among them, and none that one which was stopped is better than."""
    names = "abcde"[:num_trials]
    outcomes = set()
    for number, order in enumerate(permutations(range(num_trials))):
        if number % (1 + num_trials**2 // 8):
            continue  # a part of the many orders of five is enough
        found = at_their_rung(tmp_path / str(number), factor, **{names[rank]: float(rank) for rank in order})
        found.ask_woken()
        assert len(found.told) == num_trials
        outcomes.add(tuple(sorted(found.passed)))
    assert len(outcomes) == 1, "who passes does not depend on who came first"
    (passed,) = outcomes
    assert passed == tuple(names[: len(passed)])
    assert 1 <= len(passed) <= -(-num_trials // factor)


@given(losses=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8, unique=True), factor=st.sampled_from([2, 3, 4]))
def test_the_best_passes_and_no_more_than_the_rule_lets(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], factor: int
) -> None:
    names = [f"t{number}" for number in range(len(losses))]
    found = at_their_rung(tmp_path_factory.mktemp("asha"), factor, **dict(zip(names, losses, strict=True)))
    found.ask_woken()
    best_first = [name for _, name in sorted(zip(losses, names, strict=True))]
    assert sorted(found.told) == sorted(names)
    assert set(found.passed) == set(best_first[: len(found.passed)])
    assert 1 <= len(found.passed) <= -(-len(losses) // factor)
