"""Thousands of disturbed runs without a process: the controller on a manual clock, its journal, slots and senders.

Each schedule is drawn from its seed alone: how far the trials are when the fault of its kind strikes, at whom, and
whether a second one follows. `tests/unit/orchestrator/control/test_failpoints.py` has each fault at each write of one
story; here stories differ. A schedule whose fault has struck nothing is no schedule.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.nodes import NodeView
from orchestrator.control.orders import (
    Beat,
    Events,
    Fallback,
    Outcome,
    OverrideReport,
    Report,
    Resumption,
    SlotOp,
    Status,
    StopMode,
)
from orchestrator.control.silence import Silence
from orchestrator.errors import JournalError
from orchestrator.hung import Process, verdict
from orchestrator.policies.plan import TrialId
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.test_failpoints import Fault, Stage
from tests.unit.orchestrator.control.worlds import DEVICE, Worker

TRIALS = tuple(TrialId(f"t{number}") for number in range(4))
NUM_REPORTS = 3
_ROUNDS = 200


class Simulation:
    """One disturbed run.

    Attributes:
        stage: controller, journal and clock.
        workers: the newest processes of each slot.
        fired: what has struck.
    """

    def __init__(self, run_dir: Path, seed: str) -> None:
        self.draw = random.Random(seed)
        self.stage = Stage(run_dir)
        self.fired: list[str] = []
        self.stage.controller.take_nodes((NodeView(node_id=DEVICE.node_id, num_cores=2),))
        self.workers = [self.stage.attach(f"slot-{number}") for number in range(2)]
        for trial_id in TRIALS:
            self.stage.controller.submit(trial_id, {"lr": 0.1}, Resumption(token=f"first-{trial_id}"))
            self.stage.ask(trial_id, 0)

    def train(self, num_rounds: int) -> None:
        """Decide, train and now and then report, as far as nothing has ended."""
        for _ in range(num_rounds):
            self.stage.decide()
            for worker in list(self.workers):
                self.advance(worker)
            assert self.stage.held() <= 1.0 + 1e-9, "a device is over-committed"

    def advance(self, worker: Worker) -> None:
        """What a worker group does in a moment."""
        order = worker.order()
        if order is None or order.op is not SlotOp.RUN or order.trial is None:
            return
        worker.obey()
        if worker.leave() or worker.grant is None:
            return
        trial = self.stage.trial(order.trial.trial_id)
        index = len(trial.reports)
        if index >= NUM_REPORTS:
            worker.finish()
        elif index < order.credit and self.draw.random() < 0.3:
            self.report(worker, index)
        else:
            self.stage.ask(trial.trial_id, index)

    def report(self, worker: Worker, index: int) -> None:
        """Report and commit, under a name that no other trial's commit has."""
        assert worker.attempt is not None
        name = f"/c/{worker.attempt[0]}-{worker.attempt[1]}-{index}"
        if name not in self.stage.commits:  # a report that comes again is of the same commit
            self.stage.commits[name] = worker.step, worker.position
        step, position = self.stage.commits[name]
        metrics = {"val_loss": 1.0}
        told = Report(index=index, step=step, num_samples=position, metrics=metrics, checkpoint=name)
        worker.tell(Events(number=0, reports=(told,)))

    def busy(self) -> Worker | None:
        """A worker group with a trial that has a grant, if there is one."""
        found = [each for each in self.workers if each.attempt is not None and each.grant is not None]
        found = [each for each in found if self.is_current(each)]
        return self.draw.choice(found) if found else None

    def is_current(self, worker: Worker) -> bool:
        order = worker.order()
        now = None if order is None or order.trial is None else (order.trial.trial_id, order.trial.attempt)
        return now is not None and now == worker.attempt

    def renew(self, worker: Worker) -> Worker:
        """The processes of a slot have died, and others are there."""
        fresh = self.stage.attach(worker.slot_id)
        self.workers[self.workers.index(worker)] = fresh
        return fresh

    def end(self) -> None:
        """Let every trial come to its end."""
        for _ in range(_ROUNDS):
            self.train(1)
            if all(self.stage.trial(each).state.is_final for each in TRIALS):
                return


Strike = Callable[[Simulation, Worker], None]


def _journal(fault: Fault) -> Strike:
    def strike(sim: Simulation, _worker: Worker) -> None:
        number = len(sim.stage.writes) + sim.draw.randrange(1, 6)
        sim.stage.faults[number] = fault
        for _ in range(40):
            if number in sim.stage.faults:
                sim.train(1)
        if number not in sim.stage.faults:
            sim.fired.append(f"{fault} at write {number}")
        sim.stage.faults.pop(number, None)

    return strike


def _actor_killed(sim: Simulation, _worker: Worker) -> None:
    sim.stage._keep_what_was_answered()
    sim.stage.restart()
    sim.fired.append("the actor was killed between two messages")


def _group_died(sim: Simulation, worker: Worker) -> None:
    sim.renew(worker)
    sim.fired.append(f"the processes of {worker.slot_id} died")


def _slot_lost(sim: Simulation, worker: Worker) -> None:
    sim.stage.controller.lose_slot(worker.slot_id, "its controller died")
    sim.renew(worker)
    sim.fired.append(f"{worker.slot_id} was lost")


def _zombie(sim: Simulation, worker: Worker) -> None:
    """Processes that were taken for dead go on telling: nothing of it may count."""
    sim.renew(worker)
    assert worker.attempt is not None
    assert not worker.tell(Events(number=1, records=(worker.train(3, 0.02),)))
    before = len(sim.stage.trial(worker.attempt[0]).reports)
    sim.report(worker, before)
    worker.finish()
    assert len(sim.stage.trial(worker.attempt[0]).reports) == before
    sim.fired.append(f"a zombie of {worker.slot_id} spoke in vain")


def _told_twice(sim: Simulation, worker: Worker) -> None:
    """An answer is lost, and the message comes again."""
    message = Events(number=1, records=(worker.train(3, 0.02),))
    worker.tell(message)
    worker.tell(message)
    assert worker.attempt is not None
    trial = sim.stage.trial(worker.attempt[0])
    index = len(trial.reports)
    if index < NUM_REPORTS:
        sim.report(worker, index)
        sim.report(worker, index)
        assert len(trial.reports) == index + 1
    sim.fired.append("messages came twice")


def _out_of_memory(sim: Simulation, worker: Worker) -> None:
    assert worker.grant is not None
    smaller = replace(worker.grant.settings, micro_batch=4)
    outcome = Outcome(status=Status.MEMORY, step=worker.step, num_samples=0, reason="full", settings=smaller)
    sim.stage.controller.poison_slot(worker.slot_id, worker.epoch, outcome)
    sim.renew(worker)
    sim.fired.append(f"a rank of {worker.slot_id} ran out of memory")


def _overridden(sim: Simulation, worker: Worker) -> None:
    assert worker.grant is not None
    settings = replace(worker.grant.settings, micro_batch=4, grad_accum=2)
    number = 1_000_000 + sim.draw.randrange(1000)
    told = OverrideReport(
        generation=worker.grant.generation, number=number, settings=settings, step=worker.step, reason="non-finite"
    )
    worker.tell(Events(number=1, overrides=(told,)))
    sim.fired.append("a trial protected itself")


def _damaged(sim: Simulation, worker: Worker) -> None:
    fallback = Fallback(checkpoint="/c/damaged", step=max(0, worker.step - 3), num_steps=3)
    worker.tell(Events(number=1, fallbacks=(fallback,)))
    sim.fired.append("a commit was damaged")


def _hung(sim: Simulation, worker: Worker) -> None:
    """A rank gives no heartbeat: it is found, and its group renewed."""
    stage = sim.stage
    silence, found = Silence(stage.controller.world, stage.controller.run), []
    assert worker.attempt is not None
    for _ in range(14):
        stage.clock.advance(1.0)
        silence.take(worker.attempt, 0, Beat(number=1, doing="step", limit_s=10.0), stage.clock.now_s())
        silence.taken(worker.attempt, 0, 0.0)
        silent = silence.look(stage.clock.now_s())
        found = [each for each in silent if each.slot_id == worker.slot_id and each.is_over]
    assert found
    assert verdict(found[0], Process(state="stopped"), None) == "restart"
    stage.controller.silence_found(found[0], Process(state="stopped"), is_restarted=True)
    sim.renew(worker)
    sim.fired.append(f"rank 0 of {worker.slot_id} hung for {found[0].silent_s:.0f} s")


def _disk_full(sim: Simulation, worker: Worker) -> None:
    """The journal refuses everything for a while; training goes on, and what was told is told again."""
    stage = sim.stage
    plain, refused = stage.real.engine._journal, []

    def refuse(_events: object) -> None:
        refused.append(1)
        raise JournalError("no room on the disk")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "append", refuse)
        for _ in range(sim.draw.randrange(1, 5)):
            with pytest.raises(JournalError):
                stage.real.stop_trial(_trial_of(worker), StopMode.CHECKPOINT)
    assert refused
    sim.fired.append(f"{len(refused)} writes were refused")


def _trial_of(worker: Worker) -> TrialId:
    assert worker.attempt is not None
    return worker.attempt[0]


def _moved(sim: Simulation, worker: Worker) -> None:
    """The search puts a trial aside and lets it go on."""
    assert worker.attempt is not None
    trial_id = worker.attempt[0]
    sim.stage.controller.pause(trial_id)
    sim.train(2)
    token = f"again-{sim.draw.random()}"
    sim.stage.controller.submit(trial_id, {"lr": 0.1}, Resumption(token=token))
    sim.fired.append(f"{trial_id} was put aside and taken up")


KINDS: dict[str, Strike] = {
    **{f"journal: {fault.name.lower().replace('_', ' ')}": _journal(fault) for fault in Fault},
    "actor killed": _actor_killed,
    "group died": _group_died,
    "slot lost": _slot_lost,
    "zombie": _zombie,
    "told twice": _told_twice,
    "out of memory": _out_of_memory,
    "override": _overridden,
    "damaged commit": _damaged,
    "hung": _hung,
    "disk full": _disk_full,
    "paused": _moved,
}
"""What strikes, by kind."""


def simulate(run_dir: Path, kind: str, seed: int) -> tuple[list[str], list[str]]:
    """Play one schedule; what has struck, and what is wrong with what came of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        patch.setattr(logging.getLogger("orchestrator"), "level", logging.CRITICAL)
        sim = Simulation(run_dir, f"{kind}/{seed}")
        sim.train(sim.draw.randrange(2, 12))
        for name in (kind, sim.draw.choice([kind, *KINDS]) if sim.draw.random() < 0.5 else None):
            worker = sim.busy()
            for _ in range(20):
                if worker is not None:
                    break
                sim.train(1)
                worker = sim.busy()
            if name is not None and worker is not None:
                KINDS[name](sim, worker)
            sim.train(sim.draw.randrange(1, 4))
        sim.end()
        sim.stage.check()
        sim.stage.controller.engine.telemetry.flush()
    return sim.fired, _violations(sim)


def _violations(sim: Simulation) -> list[str]:
    found = [str(each) for each in verify(sim.stage.run_dir)["violations"]]
    for trial_id in TRIALS:
        trial = sim.stage.trial(trial_id)
        indices = [report.index for report in trial.reports]
        if trial.state.value != "done" and not _was_charged_out(trial.reason):
            found.append(f"{trial_id} is {trial.state.value}: {trial.reason}; {list(trial.story)}")
        elif trial.state.value == "done" and indices != list(range(NUM_REPORTS)):
            found.append(f"{trial_id} has reports {indices}")
    return found


def _was_charged_out(reason: str) -> bool:
    """Whether a trial was failed by name because too many slots died under it, as it has to be."""
    return "its slot died 2 times under it" in reason
