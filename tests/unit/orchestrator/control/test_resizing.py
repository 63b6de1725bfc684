"""A trial goes on with another number of ranks: nothing is lost, nobody is over-committed, and nothing hangs on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.journal import read
from orchestrator.control.orders import Status, StopMode
from orchestrator.control.trial_changes import REFUSED_PATIENCES
from orchestrator.control.world import SlotState, TrialState
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.view.explain import explain, render
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.worlds import Worker, World

T0, T1, T2 = TrialId("t0"), TrialId("t1"), TrialId("t2")
POLICY = "tests.resizing_policy:BySamples"


def world_of(run_dir: Path, max_running: int = 1, *, grow_at: int = 80, shrink_at: int = 400) -> World:
    params: dict[str, float] = {"grow_at": grow_at, "shrink_at": shrink_at}
    return World(run_dir, POLICY, policy_params=params, max_running=max_running)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = world_of(tmp_path / "r")
    yield world
    world.close()


def entries(world: World, kind: str) -> list[dict[str, object]]:
    return [entry for entry in read(world.run_dir / "journal.jsonl") if entry["kind"] == kind]


def stages(world: World) -> list[tuple[object, object]]:
    return [(entry["stage"], entry["num_workers"]) for entry in entries(world, "trial_resize")]


def dumps(entry: dict[str, object]) -> str:
    return json.dumps(entry, separators=(",", ":"))


def train_until(world: World, worker: Worker, num_samples: int) -> None:
    while worker.position < num_samples:
        world.decide()
        worker.obey()


def begin(world: World) -> Worker:
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    return worker


def test_a_trial_grows_and_shrinks_without_losing_a_sample(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    assert world.slots_to_open() == (2,)
    world.controller.expect_slot("slot-x0", 2)
    assert world.slots_to_open() == (), "it is on its way"
    assert "2 ranks on their way" in world.shown()
    train_until(world, one, 160)  # meanwhile the trial goes on
    two = world.attach("slot-x0", 2)
    trial = world.trial(T0)
    assert trial.stop is StopMode.RESIZE
    left_at = one.position
    assert one.leave()
    assert (trial.state, trial.slot_id, trial.num_workers) == (TrialState.RUNNING, "slot-x0", 2)
    assert world.held() == 0.0, "what it had is given back before it is granted anything"
    world.decide()
    two.obey()
    assert two.grant is not None
    assert (two.grant.settings.num_workers, two.grant.settings.global_batch) == (2, 8)
    assert two.position > left_at
    train_until(world, two, 400)
    world.decide()
    assert two.leave(), "the group of one rank is still warm"
    assert trial.slot_id == "slot-0"
    world.decide()
    one.obey()
    world.flush()
    assert stages(world) == [("wanted", 2), ("done", 2), ("wanted", 1), ("done", 1)]
    status = world.status().now()
    assert status["dials"]["workers"]["changes_applied"] == 2
    assert status["trials"][0]["num_workers"] == 1
    one.finish()
    answer = verify(world.run_dir)
    assert answer["violations"] == []
    assert answer["checked"]["attempts"] == 3
    assert "workers 2 changes" in world.shown()
    story = render(explain(world.run_dir, None))
    assert "ranks wanted after" in story
    assert "goes on with 2 ranks" in story
    decision = next(int(str(e["generation"])) for e in entries(world, "plan") if '"resize_to":2' in dumps(e))
    assert "goes on with 2 ranks when a worker group of them is there" in render(explain(world.run_dir, decision))


def test_a_group_that_does_not_come_costs_nothing_and_is_not_asked_for_at_once(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    patience_s = world.controller.run.spec.resize_patience_s
    world.clock.advance(patience_s + 1.0)
    world.controller.admit()
    assert stages(world) == [("wanted", 2), ("given_up", 2)]
    trial = world.trial(T0)
    assert (trial.state, trial.stop, trial.attempt) == (TrialState.RUNNING, StopMode.NONE, 0)
    one.obey()
    world.decide()
    world.controller.admit()
    assert world.slots_to_open() == ()
    assert entries(world, "refusal") == [], "the policy was told by the limits"
    world.restart()
    world.decide()
    assert world.slots_to_open() == (), "also by a restarted actor"
    world.clock.advance(REFUSED_PATIENCES * patience_s + 1.0)
    one.obey()
    world.decide()
    assert world.slots_to_open() == (2,), "after a rest it is tried again"


def test_a_trial_whose_new_group_dies_before_it_comes_goes_on_in_the_old_one(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    world.attach("slot-x0", 2)
    world.controller.lose_slot("slot-x0", "its node died")
    assert one.leave()
    trial = world.trial(T0)
    assert trial.state is TrialState.QUEUED
    assert world.slots_to_open() == (2,)
    world.controller.admit()
    world.clock.advance(world.controller.run.spec.resize_patience_s + 1.0)
    world.controller.admit()
    world.controller.admit()
    assert (trial.state, trial.slot_id) == (TrialState.RUNNING, "slot-0")
    world.decide()
    before = one.position
    one.obey()
    assert one.position > before, "from the commit it had made"


def test_a_wish_that_is_taken_back_opens_nothing(tmp_path: Path) -> None:
    world = world_of(tmp_path / "r", grow_at=80, shrink_at=120)
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    assert world.slots_to_open() == (2,)
    train_until(world, one, 120)
    world.decide()
    assert world.slots_to_open() == ()
    world.attach("slot-x0", 2)
    assert world.trial(T0).stop is StopMode.NONE
    world.close()


def test_a_slot_beside_the_others_lets_no_further_trial_run(world: World) -> None:
    begin(world)
    world.controller.submit(T1, {})
    world.attach("slot-x0", 2)
    states = [trial.state for trial in world.controller.run.trials.values()]
    assert states == [TrialState.RUNNING, TrialState.QUEUED]
    assert not world.wants_slot()
    world.clock.advance(61.0)
    world.controller.close_idle_slots()
    assert world.controller.world.slots["slot-x0"].is_closing, "it is of no use"


def test_the_searchs_word_wins_over_a_move(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    world.attach("slot-x0", 2)
    world.controller.release(T0)
    one.finish(Status.INTERRUPTED, checkpoint="/c/x")
    assert world.trial(T0).state is TrialState.STOPPED


def test_a_paused_search_pauses_a_trial_that_moves(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    world.attach("slot-x0", 2)
    world.controller.pause(T0)
    assert one.leave()
    assert world.trial(T0).state is TrialState.PAUSED


def test_what_is_known_of_a_trial_goes_with_it(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    world.attach("slot-x0", 2)
    known = world.trial(T0).fit
    assert known is not None
    assert known.cells
    assert one.leave()
    assert world.trial(T0).fit == known


def test_the_cost_of_a_move_is_measured_and_told_to_the_policy(world: World) -> None:
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    two = world.attach("slot-x0", 2)
    one.leave()
    world.clock.advance(3.0)
    world.decide()
    two.obey()
    assert world.controller.run.restart_s == pytest.approx(3.0, abs=0.2)
    snapshot = world.snapshot()
    assert snapshot is not None
    assert snapshot.trials[0].restart_s == pytest.approx(3.0, abs=0.2)
    world.restart()
    assert world.controller.run.restart_s == pytest.approx(3.0, abs=0.2)


def test_a_trial_that_comes_back_to_the_same_device_is_granted_its_share_again(tmp_path: Path) -> None:
    world = World(tmp_path / "r", "static")
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    again = world.attach("slot-0")
    world.decide()
    again.obey()
    assert again.grant is not None, "the plan is the same, but nobody has been offered it"
    world.close()


GPUS = tuple(
    DeviceView(device_id=DeviceId(f"gpu-{n}"), node_id="n0", kind=DeviceKind.CUDA, units=1, device_type="g")
    for n in range(2)
)


@pytest.mark.parametrize(("slower", "ends_on"), [(0.55, 2), (1.1, 1)])
def test_the_last_trial_grows_onto_the_card_that_another_left_and_stays_where_it_is_faster(
    tmp_path: Path, slower: float, ends_on: int
) -> None:
    """`goodput_joint` with real ledger, fits and journal: it tries two ranks, and goes back if they are slower."""
    params = {"cooldown_s": 1.0}
    world = World(tmp_path / "r", "goodput_joint", policy_params=params, max_running=2)
    first, second = (world.attach(f"slot-{n}", devices=GPUS[n : n + 1]) for n in range(2))
    for trial_id in (T0, T1):
        world.controller.submit(trial_id, {})
    for _ in range(30):
        world.decide()
        first.obey()
        second.obey()
    assert world.slots_to_open() == (), "each has its card"
    second.finish()
    both: Worker | None = None
    for _ in range(400):
        world.decide()
        if world.slots_to_open() == (2,):
            both = world.attach("slot-x0", 2, devices=GPUS)
        for worker in (first, *([] if both is None else [both])):
            if not worker.leave():
                worker.obey(step_s=0.02 if worker is first else 0.02 * slower)
    trial = world.trial(T0)
    assert both is not None, "it has tried"
    assert trial.size == ends_on
    assert len(stages(world)) <= 4, "there and back once at most"
    assert entries(world, "refusal") == []
    world.flush()
    assert verify(world.run_dir)["violations"] == []
    world.close()


def test_every_cut_of_the_journal_leaves_a_trial_that_can_go_on(world: World, tmp_path: Path) -> None:
    """The actor may be killed between any two entries: it comes back to a state in which the trial ends well."""
    one = begin(world)
    train_until(world, one, 80)
    world.decide()
    two = world.attach("slot-x0", 2)
    one.leave()
    train_until(world, two, 400)
    world.decide()
    two.leave()
    world.decide()
    one.obey()
    lines = (world.run_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for length in range(1, len(lines) + 1):
        run_dir = tmp_path / f"cut-{length}"
        run_dir.mkdir()
        (run_dir / "journal.jsonl").write_bytes(b"".join(lines[:length]))
        cut = world_of(run_dir)
        cut.clock.advance(world.clock.now_s())
        cut.commits = dict(world.commits)
        story = _Story(cut, trials=(T0,), slots=(("slot-0", 1), ("slot-x0", 2)))
        story.check()
        story.bring_to_an_end()
        assert cut.trial(T0).state is TrialState.DONE
        cut.close()


MOVES = st.lists(
    st.sampled_from(["train", "train", "leave", "open", "decide", "restart", "lose", "die", "wait", "tick", "stop"]),
    min_size=5,
    max_size=60,
)


@given(MOVES, st.integers(0, 1_000))
@settings(max_examples=12, deadline=None)
def test_no_history_loses_a_sample_or_a_trial_or_over_commits(
    tmp_path_factory: pytest.TempPathFactory, moves: list[str], salt: int
) -> None:
    """Whatever dies in the middle of a move, what is left is consistent, and all trials can still end."""
    world = world_of(tmp_path_factory.mktemp("r") / "r", max_running=2, grow_at=80, shrink_at=240)
    story = _Story(world)
    for number, move in enumerate(moves):
        story.make(move, number + salt)
        story.check()
    story.bring_to_an_end()
    world.flush()
    assert verify(world.run_dir)["violations"] == []
    world.close()


class _Story:
    """Workers of a world, and what may happen to them."""

    def __init__(
        self,
        world: World,
        trials: tuple[TrialId, ...] = (T0, T1, T2),
        slots: tuple[tuple[str, int], ...] = (("slot-0", 1), ("slot-1", 1)),
    ) -> None:
        self.world, self.num_opened = world, 1
        self.workers: dict[str, Worker] = {name: world.attach(name, size) for name, size in slots}
        for trial_id in trials:
            world.controller.submit(trial_id, {})

    def make(self, move: str, number: int) -> None:
        world, names = self.world, sorted(self.workers)
        name = names[number % len(names)] if names else ""
        if move == "decide":
            world.decide()
        elif move == "tick":
            world.controller.admit()
        elif move == "restart":
            world.close()  # what was answered is on disk
            world.restart()
        elif move == "wait":
            world.clock.advance(50.0)
        elif move == "open":
            self.open()
        elif move == "stop" and number % 7 == 0:
            world.controller.release(T1)
        elif name and move in {"train", "leave"}:
            self.serve(self.workers[name])
        elif name and move == "lose":
            world.controller.lose_slot(name, "lost", is_charged=False)
            del self.workers[name]
        elif name and move == "die":  # the node of a group dies and comes back: no restart is charged
            world.controller.lose_slot(name, "died", is_charged=False)
            self.workers[name] = world.attach(name, self.workers[name].num_workers)

    def open(self) -> None:
        for size in self.world.slots_to_open():
            slot_id = f"slot-x{self.num_opened}"
            self.num_opened += 1
            self.world.controller.expect_slot(slot_id, size)
            self.workers[slot_id] = self.world.attach(slot_id, size)

    def serve(self, worker: Worker) -> None:
        order = worker.order()
        if order is None or order.trial is None:
            return
        if worker.attempt == (order.trial.trial_id, order.trial.attempt) and order.stop is not StopMode.NONE:
            if not worker.leave():
                worker.finish(Status.STOPPED)
            return
        worker.obey()
        if worker.position >= 400 and worker.grant is not None:
            worker.finish()

    def check(self) -> None:
        state = self.world.controller.run
        assert self.world.held() <= 1.0 + 1e-9
        running = state.running()
        assert len(running) <= 2
        for trial in running:
            slot = self.world.controller.world.slots[str(trial.slot_id)]
            assert (slot.trial_id, slot.state) == (trial.trial_id, SlotState.RUNNING)
            assert trial.size == slot.num_workers
        assert len({trial.slot_id for trial in running}) == len(running)
        waiting = {t.trial_id for t in state.trials.values() if t.state is TrialState.QUEUED}
        assert set(state.queue) == waiting

    def bring_to_an_end(self) -> None:
        trials = self.world.controller.run.trials
        for round_number in range(400):
            trials = self.world.controller.run.trials
            if all(trial.state.is_final for trial in trials.values()):
                break
            if not self.workers or round_number % 50 == 49:
                self.workers[f"slot-y{round_number}"] = self.world.attach(f"slot-y{round_number}")
            self.world.decide()
            self.world.controller.admit()
            self.open()
            for worker in list(self.workers.values()):
                self.serve(worker)
                self.check()
        assert all(trial.state.is_final for trial in trials.values()), [t.story for t in trials.values()]
