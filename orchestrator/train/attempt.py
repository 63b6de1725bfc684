"""One attempt of a trial on one rank, whoever makes its steps: orders, dials, telemetry, reports and leaving.

What makes the steps is a driver: `loop.TrialLoop` for declared trainings, `function.driver.FunctionDriver` for users'
functions. A driver calls `cross` at each step boundary, `record` for each step and `report` for each report. Talks to
the outside only through a `Link` and a `Boundary`, so that a test runs it without Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.control.orders import (
    Ack,
    DialReport,
    Fallback,
    Grant,
    Note,
    Outcome,
    OverrideReport,
    Report,
    SlotOrder,
    Status,
    StopMode,
    TrialOrder,
)
from orchestrator.errors import NoRoomError
from orchestrator.policies.plan import Settings
from orchestrator.room import POLL_S
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.telemetry.record import FLAG_APPLIED, tier_code
from orchestrator.train import best
from orchestrator.train.batch.guard import Move
from orchestrator.train.best import Best
from orchestrator.train.boundary import Boundary
from orchestrator.train.commit_directory import step_of
from orchestrator.train.dials.dial import Dial, limits_of, reasons_off, turn
from orchestrator.train.groups import Ranks
from orchestrator.train.link import Link, Outbox
from orchestrator.train.step_result import StepResult

logger = logging.getLogger(__name__)


class Driver(Protocol):
    """What makes the steps of an attempt."""

    @property
    def progress(self) -> tuple[int, int]:
        """Optimizer steps done, and samples used by them."""
        ...

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        ...

    @property
    def dials(self) -> Sequence[Dial]:
        """The dials of this training, in the order in which they are set."""
        ...

    @property
    def commits_together(self) -> bool:
        """Whether all ranks make a commit together, at the same boundary."""
        ...

    def settle(self) -> None:
        """Wait until every step that was begun is over and recorded."""
        ...

    def turned(self, asked: Settings, settings: Settings) -> str:
        """The dials were set to `settings` where `asked` was granted; why they differ, if they do."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When a step began (CLOCK_MONOTONIC), and its seconds by what they were spent on."""

    began_s: float
    step_s: float
    cpu_s: float
    wait_s: float
    switch_s: float


class Attempt:
    """The orders and the telemetry of one attempt.

    Attributes:
        trial: what was asked for.
        order: the newest order.
        grant: the allocation in force, None before the first.
        num_reports: reports made so far, those of earlier attempts included.
    """

    def __init__(self, order: SlotOrder, ranks: Ranks, boundary: Boundary, link: Link, share: ShareMechanism) -> None:
        assert order.trial is not None
        self.trial: TrialOrder = order.trial
        self.order = order
        self.grant: Grant | None = None
        self.num_reports = self.trial.num_reports_done
        self.ranks, self.share, self._link = ranks, share, link
        self._boundary = boundary
        self._unsaid_ack: Ack | None = None
        self._num_overrides = 0
        self._seq = 0
        self._said_dials: DialReport | None = None

    @property
    def directory(self) -> Path:
        """The trial's own directory."""
        return Path(self.trial.directory)

    @property
    def is_paused(self) -> bool:
        """Whether the trial holds no share and waits at its boundary with all its state."""
        return self.grant is not None and self.grant.settings.share == 0

    @property
    def is_told_to_leave(self) -> bool:
        """Whether the newest order ends this attempt."""
        return self.order.stop is not StopMode.NONE

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that tells what all ranks did."""
        return self.ranks.rank == 0

    @property
    def outbox(self) -> Outbox:
        """Where messages to the policy actor are put."""
        return self._link.outbox

    def resumed(self, driver: Driver) -> None:
        """Say so where the driver went on from an older commit than it was given, because that one is damaged."""
        assert self.trial.resume_from is not None
        wanted, (step, _) = step_of(Path(self.trial.resume_from)), driver.progress
        logger.info("resumed from %s at step %d", self.trial.resume_from, step)
        if self.speaks and wanted is not None and step < wanted:
            fallback = Fallback(checkpoint=self.trial.resume_from, step=step, num_steps=wanted - step)
            self._link.outbox.add_fallback(fallback)

    def cross(self, driver: Driver) -> float:
        """Follow a new order from here on, between two steps; returns the seconds that took."""
        order = self._boundary.cross()
        self._say_ack()
        return self.follow(order, driver)

    def follow(self, order: SlotOrder | None, driver: Driver) -> float:
        """Make an order the current one and apply the allocation that it brings; returns the seconds that took."""
        if order is not None:
            self.order = order
        grant = self.order.grant
        if grant is None or (self.grant is not None and grant.generation <= self.grant.generation):
            return 0.0
        return self._apply(grant, driver)

    def wait_until(self, is_met: Callable[[], bool], driver: Driver) -> bool:
        """Wait at a boundary until an order meets a condition; False when told to leave first."""
        while not self.is_told_to_leave:
            self.ranks.pulse.rest()
            if is_met():
                self.ranks.pulse.rest("step")  # the first one may take long
                return True
            order = self._boundary.wait()
            self._say_ack()
            self.follow(order, driver)
        self.ranks.pulse.rest("leaving")
        return False

    def poll(self, is_met: Callable[[], bool], driver: Driver) -> bool | None:
        """What `wait_until` would return, or None while it would wait."""
        self.cross(driver)
        if self.is_told_to_leave:
            return False
        return True if is_met() else None

    def when_room(self, write: Callable[[], Path | None], driver: Driver) -> Path | None:
        """The commit that `write` makes, if it makes one, as soon as the disk has room for it.

        Meanwhile the trial waits at its boundary, and the live table says so. None where the search has no further use
        for it before there is room.
        """
        is_said = False
        while True:
            try:
                with self.ranks.pulse.long("commit"):
                    path = write()
            except NoRoomError as error:
                if not is_said:
                    logger.warning("waits for room: %s", error)
                    self._note_room(str(error))
                is_said = True
                if not self._waits_on(driver):
                    return None
            else:
                if is_said:
                    logger.warning("there is room again: %s", path)
                    self._note_room("")
                return path

    def _note_room(self, text: str) -> None:
        if self.speaks:
            self.outbox.add_note(Note(kind="room", text=text))

    def _waits_on(self, driver: Driver) -> bool:
        """Wait a moment for room; False where the trial was told to leave without a commit."""
        if self.ranks.world_size > 1 and not driver.commits_together:
            time.sleep(POLL_S)  # alone: the others know nothing of it, and an order is met by all
        else:
            self.follow(self._boundary.wait(POLL_S), driver)
        return self.order.stop is not StopMode.DISCARD

    def override(self, driver: Driver, move: Move, *, is_lasting: bool = True) -> None:
        """Tell of a protective move that was made inside the limits."""
        self._num_overrides += 1
        logger.warning("override %d: %s", self._num_overrides, move.reason)
        if self.speaks:
            report = OverrideReport(
                generation=0 if self.grant is None else self.grant.generation,
                number=self.trial.attempt * 1_000_000 + self._num_overrides,
                settings=driver.settings,
                step=driver.progress[0],
                reason=move.reason,
                instead_of=move.instead_of,
                is_lasting=is_lasting,
            )
            self._link.outbox.add_override(report)

    def tell_dials(self, driver: Driver) -> None:
        """Say what this training allows of its dials, where that is news."""
        report = DialReport(
            step=driver.progress[0],
            start=driver.settings,
            limits=limits_of(driver.dials, self.trial.limits),
            off=reasons_off(driver.dials),
        )
        if self._said_dials is None or (report.limits, report.off) != (self._said_dials.limits, self._said_dials.off):
            for name, reason in sorted(report.off.items()):
                logger.info("dial %s is off: %s", name, reason)
            self._said_dials = report
            if self.speaks:
                self._link.outbox.add_dials(report)

    def record(self, result: StepResult, times: Times, *, flags: int, memory_bytes: int, settings: Settings) -> None:
        """Append the telemetry of one step; fields in the order of STEP_DTYPE."""
        assert self.grant is not None
        nan = float("nan")
        self._link.outbox.add_record(
            (
                self._seq,
                result.step,
                self.grant.generation,
                result.position,
                result.num_samples,
                settings.micro_batch,
                settings.grad_accum,
                settings.num_workers,
                tier_code(settings.tier),
                flags | (FLAG_APPLIED if times.switch_s else 0),
                settings.share,
                self.grant.amount,
                times.began_s,
                times.step_s,
                result.data_s,
                times.wait_s,
                times.switch_s,
                times.cpu_s,
                result.loss,
                result.grad_norm,
                result.learning_rate,
                nan if result.noise is None else result.noise.noise_trace,
                nan if result.noise is None else result.noise.grad_sq,
                memory_bytes,
            )
        )
        self._seq += 1

    def report(self, driver: Driver, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Tell the search of results; `checkpoint` is the commit of the state behind them."""
        step, num_samples = driver.progress
        index, self.num_reports = self.num_reports, self.num_reports + 1
        if self.speaks:
            report = Report(
                index=index,
                step=step,
                num_samples=num_samples,
                metrics=dict(metrics),
                checkpoint=None if checkpoint is None else str(checkpoint),
            )
            if checkpoint is not None and self.trial.metric in metrics:
                value = float(metrics[self.trial.metric])
                found = Best(commit=checkpoint.name, step=step, metric=self.trial.metric, value=value)
                best.note(checkpoint.parent, found, self.trial.mode)
            self._link.outbox.add_report(report)
        logger.info("report %d at step %d: %s", index, step, dict(metrics))

    def has_credit(self) -> bool:
        """Whether the search asked for one more report."""
        return self.order.credit > self.num_reports

    def may_go_on(self, driver: Driver) -> bool:
        """Wait after a report for the search's word; False when told to leave."""
        return self.wait_until(self.has_credit, driver)

    def outcome(self, status: Status, driver: Driver, path: Path | None = None) -> Outcome:
        """How this attempt ended, where the driver stands now."""
        step, num_samples = driver.progress
        return Outcome(
            status=status,
            step=step,
            num_samples=num_samples,
            reason="",
            checkpoint=None if path is None else str(path),
        )

    def _apply(self, grant: Grant, driver: Driver) -> float:
        """Set all dials; every rank does so before the same step. Returns the seconds that took."""
        driver.settle()  # steps on their way belong to the grant before
        began_s = time.monotonic()
        with self.ranks.pulse.long("turning the dials"):
            settings = turn(driver.dials, grant)
        self.ranks.pulse.forget()
        why_not = driver.turned(grant.settings, settings)
        self.grant = grant
        applied_s = time.monotonic()
        self._unsaid_ack = Ack(
            generation=grant.generation,
            settings=grant.settings,
            step=driver.progress[0],
            applied_s=applied_s,
            switch_s=applied_s - began_s,
        )
        if self.ranks.world_size == 1:
            self._say_ack()
        if settings != grant.settings:
            self.override(driver, Move(instead_of=grant.settings, reason=why_not))
        return applied_s - began_s

    def _say_ack(self) -> None:
        """Acknowledge one boundary later: the step in between proved that every rank has applied it."""
        if self._unsaid_ack is not None and self.speaks:
            self._link.outbox.add_ack(self._unsaid_ack)
        self._unsaid_ack = None
