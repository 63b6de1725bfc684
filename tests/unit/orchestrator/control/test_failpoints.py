"""A journal that refuses or tears a write, or an actor that is killed: nothing is lost and nothing is doubled.

One story is told by senders that send again what was not taken, as worker groups and the search do. It is undisturbed
once; then each fault strikes at each kind of write in it, and pairs of faults at random ones.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control import steering
from orchestrator.control.effects import Applied
from orchestrator.control.engine import relocated
from orchestrator.control.entries import EVENTS
from orchestrator.control.events import Event
from orchestrator.control.journal import FILE_NAME, Journal, line_of, read_events
from orchestrator.control.nodes import NodeView
from orchestrator.control.orders import DialReport, Events, Fallback, Outcome, OverrideReport, Resumption, Status
from orchestrator.control.transition import apply
from orchestrator.control.world import World as ControlWorld
from orchestrator.errors import JournalError
from orchestrator.policies.plan import TrialId
from orchestrator.requests import Request
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.states import durable_state
from tests.unit.orchestrator.control.worlds import DEVICE, Worker, World

T0, T1, T2 = TrialId("t0"), TrialId("t1"), TrialId("t2")
HERE = NodeView(node_id=DEVICE.node_id, num_cores=2)


class Fault(StrEnum):
    """What strikes at a write."""

    REFUSED = "refused before anything is written"
    CUT_SHORT = "refused after a part was written"
    NOT_DURABLE = "written, but the sync behind it fails"
    KILLED_BEFORE = "the actor dies before it writes"
    KILLED_WITHIN = "the actor dies in the middle of a line"
    KILLED_BETWEEN = "the actor dies between the entries of one write"
    KILLED_AFTER = "the actor dies when all is written and nothing applied"


class ActorKilledError(Exception):
    """The actor's process is gone."""


class FaultyJournal(Journal):
    """A journal whose n-th write, over all actors of the run, meets a fault."""

    def __init__(self, path: Path, faults: dict[int, Fault], seen: list[tuple[str, ...]]) -> None:
        super().__init__(path)
        self._path_of, self._faults, self._seen = path, faults, seen
        self._fails_next_sync = False

    def append(self, events: Sequence[Event]) -> None:
        self._seen.append(tuple(event.kind for event in events))
        fault = self._faults.pop(len(self._seen), None)
        lines = [line_of(replace(event, seq=self._next_seq + number)) for number, event in enumerate(events)]
        if fault is Fault.REFUSED:
            raise JournalError("no space left")
        if fault is Fault.CUT_SHORT:
            self._append_raw(b"".join(lines)[:-3])
            os.truncate(self._path_of, self._size)
            raise JournalError("only a part was taken")
        if fault is Fault.KILLED_BEFORE:
            raise ActorKilledError
        if fault is Fault.KILLED_WITHIN:
            self._append_raw(b"".join(lines)[:-3])
            raise ActorKilledError
        if fault is Fault.KILLED_BETWEEN:
            self._append_raw(lines[0])
            raise ActorKilledError
        super().append(events)
        if fault is Fault.KILLED_AFTER:
            raise ActorKilledError
        self._fails_next_sync = fault is Fault.NOT_DURABLE

    def sync(self) -> None:
        if self._fails_next_sync:
            self._fails_next_sync, self._is_intact = False, False
            raise JournalError("the disk is gone for a moment")
        super().sync()

    def _append_raw(self, data: bytes) -> None:
        with self._path_of.open("ab") as file:
            file.write(data)


@dataclass
class Stage(World):
    """A world whose senders send again, and whose journal is faulty."""

    faults: dict[int, Fault] = field(default_factory=dict)
    writes: list[tuple[str, ...]] = field(default_factory=list)

    def restart(self) -> None:
        super().restart()
        path = self.run_dir / FILE_NAME
        self.controller.engine._journal = FaultyJournal(path, self.faults, self.writes)
        self.real = self.controller
        self.controller = _Senders(self)  # type: ignore[assignment]

    def perform(self) -> None:
        self.send(super().perform)

    def send(self, message: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Send until it is taken. A message to an actor that was killed goes to the next one."""
        name = message.__name__
        while True:
            try:
                return getattr(self.real, name, message)(*arguments, **options)
            except JournalError:
                continue
            except ActorKilledError:
                self._keep_what_was_answered()
                self.restart()

    def _keep_what_was_answered(self) -> None:
        """The actor answers a message with records only when they are in their table."""
        engine = self.real.engine
        engine._journal._unsynced.clear()
        engine.perform()
        engine.telemetry.flush()

    def check(self) -> None:
        """The actor knows what its journal says, and no device is over-committed."""
        self.perform()
        spec = self.real.run.spec
        folded = ControlWorld((spec,))
        for event in read_events(self.run_dir / FILE_NAME):
            assert isinstance(apply(folded, relocated(event, spec)), Applied)
        known = durable_state(self.real.world, self.real.run)
        assert _known(durable_state(folded, folded.runs[spec.run_id])) == _known(known)
        assert self.held() <= 1.0 + 1e-9


class _Senders:
    """The controller as its senders see it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stage.real, name)
        if not callable(found) or name in {"engine", "world", "run", "admission", "checks"}:
            return found

        def send(*arguments: Any, **options: Any) -> Any:
            return self._stage.send(found, *arguments, **options)

        return send


def _known(state: dict[str, Any]) -> dict[str, Any]:
    """Without what telemetry alone says between two plans."""
    for trial in state["trials"].values():
        for name in ("modes", "loss"):
            del trial[name]
    return state


def tell(stage: Stage) -> None:
    """The story: two slots, three trials, and everything that may happen to them."""
    control = stage.controller
    control.take_nodes((HERE,))
    workers = [stage.attach("slot-0"), stage.attach("slot-1")]
    for trial_id in (T0, T1, T2):
        control.submit(trial_id, {"lr": 0.1}, Resumption(token=f"first-{trial_id}"))
        stage.ask(trial_id, 0)
    _train(stage, workers)
    for worker in workers:
        worker.report(0, 1.0)
    stage.check()
    granted = workers[0].grant
    assert granted is not None
    smaller = replace(granted.settings, micro_batch=4, grad_accum=2)
    report = OverrideReport(generation=granted.generation, number=1, settings=smaller, step=3, reason="full")
    damaged = Fallback(checkpoint="/c/0", step=0, num_steps=1)
    workers[0].tell(Events(number=1, overrides=(report,), fallbacks=(damaged,)))
    spec = stage.real.run.spec
    declared = DialReport(step=1, start=spec.start, limits=spec.limits, off={"precision": "it has its own"})
    workers[1].tell(Events(number=2, dials=(declared,)))
    _train(stage, workers)
    _steer(stage)
    control.pause(T1)
    control.submit(T1, {"lr": 0.2}, Resumption(token="second-t1", origin=T0, num_reports=1, checkpoint="/c/0"))
    workers[1].leave()
    stage.check()
    _train(stage, workers)
    raised = Outcome(status=Status.MEMORY, step=9, num_samples=72, reason="full", settings=smaller)
    control.poison_slot("slot-0", workers[0].epoch, raised)
    workers[0] = stage.attach("slot-0")
    _train(stage, workers)
    control.lose_slot("slot-1", "its controller died")
    workers[1] = stage.attach("slot-1")
    _train(stage, workers)
    stage.check()
    _end(stage, workers)


def _steer(stage: Stage) -> None:
    """Somebody adds a trial, clones one, and has a third rest for a while."""
    asked = (("add", ""), ("clone", T0), ("pause", T2), ("set", ""), ("resume", T2))
    for number, (command, trial_id) in enumerate(asked, start=1):
        values = {"weight": 2.0} if command == "set" else {"lr": 0.3} if command in {"add", "clone"} else {}
        request = Request(request_id=f"q{number}", command=command, trial_id=trial_id, values=values, by="somebody")
        for _ in range(2):  # a second time it changes nothing
            stage.controller.steer(request)


def _train(stage: Stage, workers: list[Worker]) -> None:
    for _ in range(3):
        stage.decide()
        for worker in workers:
            worker.obey()


def _end(stage: Stage, workers: list[Worker]) -> None:
    """Every trial makes its reports and ends."""
    for _ in range(60):
        stage.decide()
        for worker in workers:
            order = worker.order()
            if order is None or order.trial is None:
                continue
            worker.obey()
            trial = stage.trial(order.trial.trial_id)
            if worker.grant is not None and len(trial.reports) < 3:
                worker.report(len(trial.reports), 1.0)
            elif worker.grant is not None:
                worker.finish()
        if all(trial.state.is_final for trial in stage.controller.run.trials.values()):
            break
    stage.check()


def outcome(stage: Stage) -> dict[str, Any]:
    """What must be the same whatever happened to the journal and the actor."""
    return {
        trial.trial_id: (trial.state.value, [report.index for report in trial.reports], trial.params)
        for trial in stage.controller.run.trials.values()
    }


def play(run_dir: Path, faults: dict[int, Fault]) -> Stage:
    """The story with faults at writes by their number. Nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        patch.setattr(steering, "keep_commit", lambda _commit, directory, name: directory / name)
        stage = Stage(run_dir, faults=dict(faults))
        tell(stage)
        stage.controller.engine.telemetry.flush()
    return stage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return play(tmp_path_factory.mktemp("undisturbed") / "r", {})


def test_the_story_has_what_can_be_written_while_trials_run(undisturbed: Stage) -> None:
    kinds = {kind for write in undisturbed.writes for kind in write} | {"run", "recovered"}
    elsewhere = {
        "trial_resize",
        "told",
        "refusal",
        "check",
        "gain",
        "run_ended",
        "run_interrupted",
        "trial_retried",
        "rank_silent",
    }
    assert kinds | elsewhere >= set(EVENTS) - {"trial_pinned", "trial_suspected"}
    assert {state for state, _, _ in outcome(undisturbed).values()} == {"done"}


@pytest.mark.parametrize("fault", list(Fault))
def test_one_fault_at_any_kind_of_write_changes_nothing_of_the_outcome(
    tmp_path: Path, undisturbed: Stage, fault: Fault
) -> None:
    """At the last write of each kind, where most has happened; `tests/integration` has every write."""
    for kinds, number in {kinds: number for number, kinds in enumerate(undisturbed.writes, start=1)}.items():
        stage = play(tmp_path / str(number), {number: fault})
        assert stage.faults == {}, "it has struck"
        assert outcome(stage) == outcome(undisturbed), (number, kinds)


@pytest.mark.parametrize("seed", range(6))
def test_two_faults_at_any_writes_change_nothing_of_the_outcome(tmp_path: Path, undisturbed: Stage, seed: int) -> None:
    stage = play(tmp_path / "r", two_faults(len(undisturbed.writes), seed))
    assert outcome(stage) == outcome(undisturbed)
    assert verify(stage.run_dir)["violations"] == []


def two_faults(num_writes: int, seed: int) -> dict[int, Fault]:
    draw = random.Random(seed)
    return {number: draw.choice(list(Fault)) for number in draw.sample(range(1, num_writes + 1), 2)}
