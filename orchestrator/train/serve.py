"""Serving trials in turn in one process: begin, run, clean up, leave together. No Ray.

Whatever a trial raises ends the trial, not the slot. What a trial leaves behind in the process is put right and named
in the log, so that the next one starts as in a new process.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from orchestrator.control.orders import Cause, Note, Outcome, SlotOp, SlotOrder, Status, StopMode, TrialOrder
from orchestrator.errors import ApplyError, OutOfMemoryError, TierError, WorkerGroupError
from orchestrator.jobs import build_job, job_info
from orchestrator.jobs.job import Job
from orchestrator.jobs.own import call_function, is_own, last_line_of, tail_of
from orchestrator.policies.plan import TrialId
from orchestrator.room import POLL_S, has_room, words
from orchestrator.share import ShareMechanism
from orchestrator.train.attempt import Driver
from orchestrator.train.batch.guard import is_out_of_memory
from orchestrator.train.boundary import Boundary
from orchestrator.train.causes import cause_of
from orchestrator.train.device_fault import is_device_fault
from orchestrator.train.function.driver import FunctionDriver
from orchestrator.train.function.workplace import logged_to
from orchestrator.train.groups import Groups, Ranks
from orchestrator.train.isolation import ProcessState, seed_generators
from orchestrator.train.link import Link
from orchestrator.train.loop import TrialLoop
from orchestrator.train.read_ahead import reading

logger = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 10.0
_BEGINS_AGAIN = {Status.MEMORY, Status.TIER}
"""After these the same processes make new groups: ranks wait in a collective that another has left."""


class SlotLink(Link, Protocol):
    """The outside of one rank of a slot: that of a trial, and the words with which trials come and go."""

    def begin(self, trial_id: TrialId, attempt: int) -> None:
        """From here on, what is told belongs to this attempt."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """All ranks have left the trial (rank 0)."""
        ...

    def fault(self, reason: str) -> None:
        """The GPU failed under this process, which ends now."""
        ...


def job_of(trial: TrialOrder) -> Job:
    """The declared training of a trial, from the table or by its import path."""
    return build_job(trial.job, trial.params)


@dataclass(slots=True, kw_only=True)
class Server:
    """Everything one rank needs to serve trials.

    Attributes:
        clean: the process before its first trial.
        build: makes the job of a trial.
        begun: trials that it has been given.
    """

    groups: Groups
    boundary: Boundary
    link: SlotLink
    share: ShareMechanism
    clean: ProcessState
    build: Callable[[TrialOrder], Job] = job_of
    begun: set[TrialId] = field(default_factory=set)

    def serve(self) -> None:
        """Run the trials this slot is given until it is told to close.

        Raises:
            WorkerGroupError: the ranks could not agree on the end of a trial, or lost each other.
        """
        finished: tuple[str, int] | None = None
        while True:
            order = self.boundary.wait()
            if order is None:
                continue
            if order.op is SlotOp.CLOSE:
                return
            if order.op is not SlotOp.RUN or order.trial is None:
                continue
            attempt = (order.trial.trial_id, order.trial.attempt)
            if attempt == finished:  # an order from before the actor learned that this attempt is over
                continue
            self.link.begin(*attempt)
            pulse = self.groups.ranks.pulse
            pulse.begin()
            self.link.outbox.pulse = pulse
            outcome = self._run_trial(order, order.trial)
            pulse.rest("leaving")
            self.share.release()
            for leak in (*self.clean.leaks(), *self.clean.restore(order.trial.seed)):
                logger.warning("trial %s left %s", order.trial.trial_id, leak)
            self._finish(outcome)
            self.link.outbox.pulse = None
            finished = attempt

    @property
    def _rank(self) -> int:
        return self.groups.ranks.rank

    def _run_trial(self, order: SlotOrder, trial: TrialOrder) -> Outcome:
        """One attempt; the second of three places that catch everything."""
        log = Path(trial.directory) / ("log.txt" if self._rank == 0 else f"log-{self._rank}.txt")
        with logged_to(log):
            drivers: list[TrialLoop | FunctionDriver] = []
            try:
                logger.info("trial %s attempt %d begins: %s", trial.trial_id, trial.attempt, trial.params)
                seed_generators(trial.seed)
                outcome = self._train(order, trial, drivers)
            except Exception as error:
                outcome = failed_outcome(error, trial, drivers[0] if drivers else None)
                if is_device_fault(error):
                    self.link.fault(outcome.reason)
                    # This process can compute no more; the trial goes on from its last commit in a new one.
                    raise WorkerGroupError(f"the GPU failed under {trial.trial_id}: {outcome.reason}") from error
                if outcome.status is Status.FAILED and self._is_alone():
                    outcome = replace(outcome, status=Status.LOST)
                if outcome.cause is Cause.DISK:
                    wait_for_room(Path(trial.directory), self.groups.ranks, self.boundary, self.link)
                if outcome.status in _BEGINS_AGAIN and self.groups.ranks.world_size > 1:
                    self.groups.break_off()  # the others wait for this rank in a collective that it will never enter
            logger.info("trial %s attempt %d ends: %s", trial.trial_id, trial.attempt, outcome.status)
            return outcome

    def _train(self, order: SlotOrder, trial: TrialOrder, drivers: list[TrialLoop | FunctionDriver]) -> Outcome:
        """Build what trains and let it run; it is appended to `drivers`, for whoever asks how far it came."""
        ranks = self._ranks_of(trial)
        if is_own(trial.job) and job_info(trial.job).is_function:
            call = partial(call_function, trial.job, trial.params)
            drivers.append(FunctionDriver(order, call, ranks, self.boundary, self.link, self.share))
            return drivers[0].run()
        with reading(self.build(trial)) as job:
            job.prepare()
            drivers.append(TrialLoop(order, job, ranks, self.boundary, self.link, self.share))
            return drivers[0].run()

    def _ranks_of(self, trial: TrialOrder) -> Ranks:
        """The ranks for a trial, which has fewer trials behind it in this process than the one before had."""
        self.begun.add(trial.trial_id)
        ranks = self.groups.ranks
        return replace(ranks, trials_ahead=max(1.0, ranks.trials_ahead - len(self.begun) + 1))

    def _is_alone(self) -> bool:
        """Whether another rank has gone: what this one raised then is no mistake of the trial."""
        return self.groups.ranks.world_size > 1 and self.groups.is_broken(0)

    def _finish(self, outcome: Outcome) -> None:
        """All ranks leave the trial together, or the group is given up."""
        self.link.flush(_FLUSH_TIMEOUT_S)
        if self.groups.ranks.world_size > 1:
            # Out of band: a rank that raised alone has left the others in a collective that will never end.
            outcome = self.link.leave(outcome)
            if outcome.status is Status.LOST:
                raise WorkerGroupError(f"a rank lost the others, and the worker group is restarted: {outcome.reason}")
            if outcome.status in _BEGINS_AGAIN:
                self._regroup()
            else:
                self.boundary.drain()
        if self._rank == 0:
            self.link.finish(outcome)
        gc.collect()

    def _regroup(self) -> None:
        """All ranks have left a trial that broke their groups: make new ones, for the trial to begin again."""
        self.groups.break_off()
        ranks = self.groups.regroup()
        self.boundary.regroup(ranks.group)
        self.clean = self.clean.regrouped()


def wait_for_room(directory: Path, ranks: Ranks, boundary: Boundary, link: Link) -> None:
    """Let a trial whose own write met a full disk begin again only when there is room, or it is not wanted."""
    if ranks.world_size > 1 or has_room(directory):
        return
    logger.warning("waits for room: %s", words(directory))
    link.outbox.add_note(Note(kind="room", text=words(directory)))
    while not has_room(directory):
        ranks.pulse.rest()
        order = boundary.wait(POLL_S)
        if order is not None and (order.stop is not StopMode.NONE or order.op is not SlotOp.RUN):
            return


def failed_outcome(error: Exception, trial: TrialOrder | None, driver: Driver | None) -> Outcome:
    """How an attempt ended that raised `error`, which is written to the log with its own traceback."""
    assert trial is not None
    cause = error.__cause__ if isinstance(error, ApplyError) else None
    logger.error("trial %s failed\n%s", trial.trial_id, tail_of(cause or error))
    step, num_samples = (0, 0) if driver is None else driver.progress
    reason = last_line_of(error) if cause is None else str(error)
    return replace(_status_after(error), step=step, num_samples=num_samples, reason=reason)


def _status_after(error: Exception) -> Outcome:
    """How an attempt ended that raised `error`; where and when is filled in."""
    if isinstance(error, OutOfMemoryError) and not error.is_final:
        return Outcome(status=Status.MEMORY, step=0, num_samples=0, settings=error.settings)
    if is_out_of_memory(error):
        return Outcome(status=Status.MEMORY, step=0, num_samples=0)
    if isinstance(error, TierError):
        return Outcome(status=Status.TIER, step=0, num_samples=0)
    return Outcome(status=Status.FAILED, step=0, num_samples=0, cause=cause_of(error))
