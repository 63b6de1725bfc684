"""Serving several trials side by side in one process: each lane has one, and equal ones are stepped as one. No Ray.

A lane is a slot of the control plane like any other: it has a link, an order and a trial of its own; only the process
is shared. One thread turns from lane to lane, waits for nothing while another lane trains, and then steps all that ask
for it. A lane's trial has the random state and the log of its own; when none is left, the process is put right.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from orchestrator.control.orders import Cause, Outcome, SlotOp, SlotOrder, TrialOrder
from orchestrator.errors import WorkerGroupError
from orchestrator.jobs.own import is_own
from orchestrator.jobs.table import job_info
from orchestrator.jobs.training import Training
from orchestrator.share.mechanism import Enforcement, ShareMechanism
from orchestrator.train.boundary import Boundary
from orchestrator.train.bundle.company import Company, turn_process
from orchestrator.train.bundle.member import Member
from orchestrator.train.course import Course, Step, Stepped, Wait
from orchestrator.train.device_fault import is_device_fault
from orchestrator.train.flat_state import capture_generators, restore_generators
from orchestrator.train.function.workplace import logged_to
from orchestrator.train.groups import Ranks
from orchestrator.train.isolation import ProcessState, seed_generators
from orchestrator.train.loop import TrialLoop
from orchestrator.train.serve import SlotLink, failed_outcome, job_of, wait_for_room

logger = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 10.0
_HEARTBEAT_S = 5.0


class Shared:
    """The share of a process, from those of its lanes: their units together, and the sum of their amounts."""

    def __init__(self, mechanism: ShareMechanism) -> None:
        self.mechanism = mechanism
        self._grants: dict[int, tuple[tuple[int, ...], float]] = {}
        self._has_paid = False

    def lane(self, number: int) -> LaneShare:
        """The part of one lane."""
        return LaneShare(self, number)

    def turn(self) -> None:
        """A new round of lanes begins, in which the process pays once for the one before."""
        self._has_paid = False

    def hold_back(self) -> float:
        """Seconds slept, by the first lane of a round that asks."""
        if self._has_paid:
            return 0.0
        self._has_paid = True
        return self.mechanism.hold_back()

    def set(self, number: int, grant: tuple[tuple[int, ...], float] | None) -> None:
        """What a lane may use, None for nothing."""
        if grant is None:
            self._grants.pop(number, None)
        else:
            self._grants[number] = grant
        if not self._grants:
            self.mechanism.release()
            return
        units = tuple(sorted({unit for own, _ in self._grants.values() for unit in own}))
        amount = sum(own for _, own in self._grants.values())
        self.mechanism.apply(units, min(amount, float(len(units))))


class LaneShare:
    """The share of one lane, as its trial sees it."""

    name: ClassVar[str] = "lane"

    def __init__(self, shared: Shared, number: int) -> None:
        self._shared, self._number = shared, number

    @property
    def enforcement(self) -> Enforcement:
        """What is enforced of the process."""
        return self._shared.mechanism.enforcement

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        """Grant the lane a part of the device, from now on."""
        self._shared.set(self._number, (units, amount))

    def hold_back(self) -> float:
        """Settle the account of the process, once a round."""
        return self._shared.hold_back()

    def wake(self) -> None:
        """End the sleep of `hold_back`."""
        self._shared.mechanism.wake()

    def charged_s(self) -> float:
        """Seconds of compute charged to the process."""
        return self._shared.mechanism.charged_s()

    def release(self) -> None:
        """The lane uses nothing any more."""
        self._shared.set(self._number, None)


@dataclass(slots=True)
class Lane:
    """One lane, and the trial in it.

    Attributes:
        number: of the lane in its process.
        link: its outside.
        boundary: where it learns of orders.
        share: its part of the process's share.
        is_closed: whether it was told to close.
        finished: the attempt that ended last: an older order may still name it.
        trial, loop, course, need, member: of the trial that it has.
        generators: random state of its trial while another lane has the process.
        reason: why its trial steps alone, as last told.
    """

    number: int
    link: SlotLink
    boundary: Boundary
    share: LaneShare
    is_closed: bool = False
    finished: tuple[str, int] | None = None
    trial: TrialOrder | None = None
    training: Training | None = None
    loop: TrialLoop | None = None
    course: Course | None = None
    need: Wait | Step | None = None
    member: Member | None = None
    generators: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The process is this lane's: its random state, and what is logged."""
        assert self.trial is not None
        with logged_to(Path(self.trial.directory) / "log.txt"):
            if self.generators:
                if self.member is not None:
                    self.generators["torch"] = self.member.generator.get_state()
                restore_generators(self.generators)
            if self.member is not None:
                turn_process(self.member)
            try:
                yield
            finally:
                self.generators = capture_generators()
                if self.member is not None:
                    self.member.generator.set_state(self.generators["torch"])


class LaneServer:
    """Serves the lanes of one process until all are told to close.

    Args:
        lanes: the lanes.
        ranks: of the process: one rank; its heartbeat is that of all its lanes, which have one thread.
        shared: its share.
        clean: the process before its first trial.
        company: who is stepped with whom.
        news: set by the links when there is a new order.
    """

    def __init__(
        self,
        lanes: list[Lane],
        ranks: Ranks,
        shared: Shared,
        clean: ProcessState,
        company: Company,
        news: threading.Event,
    ) -> None:
        self._lanes, self._ranks, self._shared, self._clean = lanes, ranks, shared, clean
        self._company, self._news = company, news
        self._is_dirty = False

    def serve(self) -> None:
        """Run the trials of the lanes.

        Raises:
            WorkerGroupError: the GPU failed, and with it every trial of the process.
        """
        while not all(lane.is_closed for lane in self._lanes):
            self._news.clear()
            self._shared.turn()
            for lane in self._lanes:
                self._turn(lane)
            asking = [lane for lane in self._lanes if isinstance(lane.need, Step)]
            if asking:
                self._step(asking)
            elif not any(self._is_ready(lane) for lane in self._lanes):
                self._ranks.pulse.rest()
                self._news.wait(_HEARTBEAT_S)
                self._ranks.pulse.rest("step")  # what comes now may take longer than a wait

    def _turn(self, lane: Lane) -> None:
        """Let a lane follow its newest order, as far as it need not be stepped."""
        if lane.course is None:
            order = None if lane.is_closed else lane.boundary.cross()
            if order is not None:
                self._take(lane, order)
        while isinstance(lane.need, Wait) and lane.loop is not None:
            need, loop = lane.need, lane.loop
            with lane.entered():
                answer = loop.attempt.poll(need.is_met, loop)
            if answer is None:
                return
            self._go_on(lane, answer)

    def _is_ready(self, lane: Lane) -> bool:
        return isinstance(lane.need, Step) or (lane.course is None and not lane.is_closed and lane.boundary.has_news)

    def _take(self, lane: Lane, order: SlotOrder) -> None:
        """An idle lane was told something new."""
        if order.op is SlotOp.CLOSE:
            lane.is_closed = True
        if order.op is not SlotOp.RUN or order.trial is None:
            return
        attempt = (order.trial.trial_id, order.trial.attempt)
        if attempt == lane.finished:  # an order from before the actor learned that this attempt is over
            return
        lane.link.begin(*attempt)
        self._ranks.pulse.begin()
        lane.link.outbox.pulse = self._ranks.pulse
        lane.trial, self._is_dirty = order.trial, True
        with lane.entered():
            logger.info("trial %s attempt %d begins: %s", *attempt, order.trial.params)
            seed_generators(order.trial.seed)
        self._go_on(lane, None, order)

    def _go_on(self, lane: Lane, answer: Any, order: SlotOrder | None = None) -> None:  # noqa: ANN401 - of a need
        """Let a lane's trial go on with an answer until it asks for something; where it ends, the lane is free.

        The fourth place that catches everything: whatever a trial raises ends the trial, not the process.
        """
        outcome = None
        try:
            with lane.entered():
                try:
                    if order is not None:
                        self._begin(lane, order)
                    assert lane.course is not None
                    lane.need = lane.course.send(answer)
                    if lane.member is None and lane.loop is not None:
                        lane.member = Member(lane.loop.stepper, torch.Generator())
                except StopIteration as end:
                    outcome = end.value
                except Exception as error:
                    outcome = self._failed(lane, error)
        finally:
            if outcome is not None:
                self._leave(lane, outcome)

    def _begin(self, lane: Lane, order: SlotOrder) -> None:
        assert order.trial is not None
        if is_own(order.trial.job) and job_info(order.trial.job).is_function:
            raise WorkerGroupError("a function has no lane; allowed: declared trainings; set slots.lanes to 1")
        lane.training = Training.of(job_of(order.trial))
        lane.training.prepare()
        lane.loop = TrialLoop(order, lane.training, self._ranks, lane.boundary, lane.link, lane.share)
        lane.loop.on_away = lambda: self._company.leave(lane.number)
        lane.course = lane.loop.course()

    def _step(self, asking: list[Lane]) -> None:
        """Step all that ask: equal ones as one, the others one after the other."""
        members = {}
        for lane in asking:
            assert isinstance(lane.need, Step)
            assert lane.member is not None
            members[lane.number] = (lane.member, lane.need.at_most)
        found = self._company.step(members)
        if found:
            self._ranks.pulse.beat()
        for lane in asking:
            if lane.number in found:
                self._go_on(lane, found[lane.number])
            else:
                self._step_alone(lane)

    def _step_alone(self, lane: Lane) -> None:
        """Step a lane's trial for as long as a bundle takes for its steps in a row, which are as many as it likes."""
        began_s = time.monotonic()
        while isinstance(lane.need, Step):
            stepped = self._alone(lane)
            if stepped is not None:
                self._go_on(lane, stepped)
            if time.monotonic() - began_s >= self._company.target_s:
                return

    def _alone(self, lane: Lane) -> Stepped | None:
        """A step of one trial; None where it failed, and the lane is free."""
        assert lane.loop is not None
        outcome = None
        with lane.entered():
            reason = self._company.why_alone(lane.number)
            if reason != lane.reason:
                lane.reason = reason
                logger.info("steps alone: %s", reason)
            began_s = time.monotonic()
            try:
                stepped = lane.loop.advance()
                self._company.note_alone(lane.number, time.monotonic() - began_s)
                return stepped
            except Exception as error:
                outcome = self._failed(lane, error)
        self._leave(lane, outcome)
        return None

    def _failed(self, lane: Lane, error: Exception) -> Outcome:
        """How a lane's trial ended that raised.

        Raises:
            WorkerGroupError: the GPU failed, which ends the process: its trials go on from their last commits.
        """
        assert lane.trial is not None
        outcome = failed_outcome(error, lane.trial, lane.loop)
        if is_device_fault(error):
            for other in self._lanes:
                if other.trial is not None:
                    other.link.fault(outcome.reason)
            raise WorkerGroupError(f"the GPU failed: {outcome.reason}") from error
        if outcome.cause is Cause.DISK:  # the other lanes write to the same disk, and wait as well
            wait_for_room(Path(lane.trial.directory), self._ranks, lane.boundary, lane.link)
        return outcome

    def _leave(self, lane: Lane, outcome: Outcome) -> None:
        """The lane's trial is over; the last one to leave has the process put right."""
        trial = lane.trial
        assert trial is not None
        with lane.entered():
            logger.info("trial %s attempt %d ends: %s", trial.trial_id, trial.attempt, outcome.status)
            self._company.leave(lane.number)
            if lane.training is not None:
                lane.training.close()
        lane.share.release()
        self._ranks.pulse.forget()  # those that stay may be put together anew
        lane.trial = lane.training = lane.loop = lane.course = lane.need = lane.member = None
        lane.generators, lane.reason = {}, ""
        lane.finished = (trial.trial_id, trial.attempt)
        if self._is_dirty and all(other.trial is None for other in self._lanes):
            self._is_dirty = False
            for leak in (*self._clean.leaks(), *self._clean.restore(trial.seed)):
                logger.warning("the trials of this process, the last one %s, left %s", trial.trial_id, leak)
        lane.link.flush(_FLUSH_TIMEOUT_S)
        lane.link.finish(outcome)
        lane.link.outbox.pulse = None
        gc.collect()
