"""Silence: who gives no sign of life for too long is named and restarted, and nothing that only takes long is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import hung
from orchestrator.clock import ManualClock
from orchestrator.control.fault_events import RankSilent
from orchestrator.control.journal import read_history
from orchestrator.control.orders import Beat
from orchestrator.control.silence import Silence, Silent
from orchestrator.hung import Process, examine, verdict
from orchestrator.jobs import build_job
from orchestrator.policies.plan import TrialId
from orchestrator.silence_watcher import SilenceWatcher
from orchestrator.train.pulse import LONG_S, Pulse
from tests.unit.orchestrator.control.worlds import Worker, World
from tests.unit.orchestrator.train.links import ONE_RANK, Script, loop, order

T0 = TrialId("t0")
SILENT = Silent(
    trial_id=T0,
    attempt=0,
    slot_id="slot-0",
    epoch=1,
    rank=0,
    pid=1,
    node_id="",
    silent_s=11.0,
    limit_s=10.0,
    doing="step",
    is_function=False,
)


# What a rank says of itself.


def beaten(clock: ManualClock, step_s: float, number: int = 20) -> Pulse:
    pulse = Pulse(clock.now_s)
    for _ in range(number):
        clock.advance(step_s)
        pulse.beat()
    return pulse


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.01, 10.0), (1.9, 10.0), (3.0, 15.0), (60.0, 300.0)])
def test_a_rank_may_be_silent_for_ten_seconds_or_five_of_its_longest_steps(step_s: float, limit_s: float) -> None:
    assert beaten(ManualClock(0.0), step_s).view.limit_s == pytest.approx(limit_s)


def test_steps_with_their_batches_of_data_are_timed_together() -> None:
    clock = ManualClock(0.0)
    pulse = Pulse(clock.now_s)
    for _ in range(20):
        clock.advance(0.5)
        pulse.beat("micro-batch")
        clock.advance(4.0)
        pulse.beat()
    assert pulse.limit_s == pytest.approx(20.0)


def test_what_is_done_once_may_take_long() -> None:
    clock = ManualClock(0.0)
    pulse = Pulse(clock.now_s)
    assert pulse.limit_s == LONG_S, "a first step"
    pulse = beaten(clock, 0.1)
    with pulse.long("compiling"):
        assert pulse.view == Beat(number=21, doing="compiling", limit_s=LONG_S)
    assert pulse.limit_s == 10.0
    pulse.beat("evaluation")
    assert pulse.limit_s == LONG_S, "its first batch"
    pulse.forget()
    pulse.beat()
    assert pulse.limit_s == LONG_S, "steps after the dials have turned"
    pulse.begin()
    assert pulse.view.doing == "beginning"


def test_old_steps_are_forgotten() -> None:
    clock = ManualClock(0.0)
    pulse = beaten(clock, 60.0, 100)
    for _ in range(300):
        clock.advance(0.01)
        pulse.beat()
    assert pulse.limit_s == 10.0


def test_a_declared_training_beats_at_each_step_batch_of_data_and_of_its_evaluation(tmp_path: Path) -> None:
    class Seen(Pulse):
        def __init__(self) -> None:
            super().__init__()
            self.kinds: list[str] = []

        def beat(self, doing: str = "step") -> None:
            self.kinds.append(doing)
            super().beat(doing)

    pulse = Seen()
    script = Script(order(tmp_path, samples_per_report=80))
    loop(script, build_job("mlp", {"width": 16, "num_samples": 512}), ranks=replace(ONE_RANK, pulse=pulse)).run()
    assert pulse.kinds.count("step") == 20
    assert pulse.kinds.count("micro-batch") >= 20
    assert pulse.kinds.count("evaluation") >= 2


def test_the_first_step_behind_a_wait_may_take_long(tmp_path: Path) -> None:
    """A trial waits for its first grant; what follows loads kernels and may compile."""

    class Seen(Pulse):
        def __init__(self) -> None:
            super().__init__()
            self.limits: list[float] = []

        def beat(self, doing: str = "step") -> None:
            self.limits.append(self.limit_s)
            super().beat(doing)

    pulse = Seen()
    script = Script(order(tmp_path, samples_per_report=80))
    loop(script, build_job("mlp", {"width": 16, "num_samples": 512}), ranks=replace(ONE_RANK, pulse=pulse)).run()
    assert pulse.limits[0] == LONG_S
    assert pulse.limits[19] == 10.0


# What the actor makes of it.


def started(tmp_path: Path) -> tuple[World, Worker, Silence]:
    world = World(tmp_path / "r")
    worker = world.attach("slot-0", 2)
    world.controller.submit(T0, {"lr": 0.1})
    world.ask(T0, 0)
    world.decide()
    worker.obey()
    return world, worker, Silence(world.controller.world, world.controller.run)


def hear(silence: Silence, now_s: float, numbers: tuple[int | None, ...], *, waited_s: float = 0.0) -> None:
    for rank, number in enumerate(numbers):
        if number is not None:
            silence.take((T0, 0), rank, Beat(number=number, doing="step", limit_s=10.0), now_s)
            silence.taken((T0, 0), rank, waited_s)


def test_of_two_ranks_the_one_that_stands_still_is_named(tmp_path: Path) -> None:
    _, _, silence = started(tmp_path)
    for second in range(12):
        hear(silence, float(second), (second, 0))
        found = silence.look(float(second))
    assert [(each.rank, each.silent_s, each.is_over) for each in found] == [(1, 11.0, True)]


def test_a_rank_that_is_never_heard_has_as_long_as_a_first_step(tmp_path: Path) -> None:
    _, _, silence = started(tmp_path)
    found: list[Silent] = []
    for second in range(0, 604, 2):
        found = silence.look(float(second))
        if second == 500:
            assert not any(each.is_over for each in found)
    assert [each.is_over for each in found] == [True, True]


def test_while_the_actor_itself_did_not_look_or_could_write_nothing_nobody_was_silent(tmp_path: Path) -> None:
    _, _, silence = started(tmp_path)
    hear(silence, 0.0, (1, 1))
    silence.look(0.0)
    assert silence.look(40.0) == [], "it was stopped"
    for second in range(41, 80):
        assert silence.look(float(second), is_held_up=True) == [], "its journal could not be written"
    for second in range(80, 92):
        found = silence.look(float(second))
    assert [each.is_over for each in found] == [True, True]


def test_an_actor_whose_policy_takes_long_finds_silence_all_the_same(tmp_path: Path) -> None:
    _, _, silence = started(tmp_path)
    hear(silence, 0.0, (1, 1))
    found: list[Silent] = []
    for look in range(6):
        found = silence.look(4.0 * look)
    assert [each.is_over for each in found] == [True, True]


def test_the_time_in_which_a_message_was_taken_is_not_the_rank_s(tmp_path: Path) -> None:
    _, _, silence = started(tmp_path)
    hear(silence, 0.0, (1, 1))
    silence.take((T0, 0), 0, Beat(number=2, doing="step", limit_s=10.0), 1.0)
    for second in range(1, 30):
        found = silence.look(float(second))
        hear(silence, float(second), (None, second))
    assert found == []
    silence.taken((T0, 0), 0, 28.0)
    assert silence.look(30.0) == []


def test_silence_is_in_the_live_table_before_anything_is_done_and_goes_with_the_next_beat(tmp_path: Path) -> None:
    world, _, silence = started(tmp_path)
    hear(silence, 0.0, (1, 1))
    for second in range(8):
        world.controller.note_silence(silence.look(float(second)))
    assert "! ranks 0, 1 silent for 7 s (step)" in world.shown()
    hear(silence, 8.0, (2, 2))
    world.controller.note_silence(silence.look(8.0))
    assert "silent" not in world.shown()


def test_what_was_found_is_in_the_journal_with_the_stack(tmp_path: Path) -> None:
    world, worker, _ = started(tmp_path)
    found = Process(state="runs", stack="File x.py, line 3 in forward")
    world.controller.silence_found(replace(SILENT, epoch=worker.epoch), found, is_restarted=True)
    world.controller.silence_found(replace(SILENT, epoch=worker.epoch, attempt=7), found, is_restarted=True)
    world.flush()
    entries = list(read_history(world.run_dir).of(RankSilent))
    assert [(each.rank, each.stack, each.is_restarted) for each in entries] == [(0, found.stack, True)]
    assert "its worker group is opened again" in world.trial(T0).story[-1]


# What is done.


@pytest.mark.parametrize(
    ("changes", "state", "timeout_s", "what"),
    [
        ({}, "runs", None, "restart"),
        ({}, "stopped", None, "restart"),
        ({"silent_s": 9.0}, "stopped", None, None),
        ({}, "gone", None, None),
        ({"is_function": True}, "runs", None, "warn"),
        ({"is_function": True}, "stopped", None, "restart"),
        ({"is_function": True}, "runs", 60.0, "warn"),
        ({"is_function": True, "silent_s": 61.0}, "runs", 60.0, "restart"),
        ({"doing": "compiling", "limit_s": LONG_S}, "runs", None, None),
    ],
)
def test_a_declared_training_is_restarted_and_a_function_named(
    changes: dict[str, Any], state: str, timeout_s: float | None, what: str | None
) -> None:
    assert verdict(replace(SILENT, **changes), Process(state=state), timeout_s) == what


@pytest.fixture
def sleeper(tmp_path: Path) -> Any:
    """A process that hangs and answers with its stacks."""
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.hung import answer_with_stacks\n"
        "answer_with_stacks(Path(sys.argv[1]))\n"
        "def hangs_here():\n    print('ready', flush=True)\n    time.sleep(60)\nhangs_here()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_hung_process_says_where_it_stands_and_a_stopped_one_is_known(tmp_path: Path, sleeper: Any) -> None:
    found = examine(sleeper.pid, tmp_path)
    assert found.state == "runs"
    assert "in hangs_here" in found.stack
    os.kill(sleeper.pid, signal.SIGSTOP)
    while not examine(sleeper.pid, None).is_stopped:
        time.sleep(0.01)
    assert examine(sleeper.pid, tmp_path) == Process(state="stopped")
    hung.end(sleeper.pid)
    sleeper.wait()
    assert examine(sleeper.pid, None).state == "gone"
    hung.end(sleeper.pid)


def test_a_process_that_would_die_of_the_signal_is_not_sent_it(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert examine(process.pid, tmp_path) == Process(state="runs")
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.parametrize(("is_stopped", "limit_s"), [(True, 10.0), (False, 60.0)])
def test_an_actor_that_does_not_answer_is_replaced_sooner_where_it_is_stopped(
    tmp_path: Path, is_stopped: bool, limit_s: float
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    if is_stopped:
        os.kill(process.pid, signal.SIGSTOP)
        while not examine(process.pid, None).is_stopped:
            time.sleep(0.01)
    clock = ManualClock(100.0)
    watcher = SilenceWatcher(None, tmp_path, None, clock.now_s)
    watcher._actor_pid = process.pid
    clock.advance(limit_s - 1)
    watcher.look_at_actor()
    assert process.poll() is None
    clock.advance(2)
    watcher.look_at_actor()
    assert process.wait(timeout=10) == -signal.SIGKILL
