"""What has to be done outside because of an event, as values. `transition.apply` returns them, `Engine` does them."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.control.world import World
from orchestrator.policies.plan import TrialId
from orchestrator.telemetry.record import StepArray


@dataclass(frozen=True, slots=True)
class Publish:
    """Send a slot its newest order, if that has changed."""

    slot_id: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Whoever waits for a report of a trial has something to read."""

    trial_id: TrialId


@dataclass(frozen=True, slots=True)
class Decide:
    """The plan in force may be out of date."""


@dataclass(frozen=True, slots=True)
class DiscardCommits:
    """Remove the checkpoints of a course that a trial gave up: they could be taken for those of its new one."""

    trial_id: TrialId


@dataclass(frozen=True, slots=True, eq=False)
class StoreSteps:
    """Put step records into the table."""

    trial_id: TrialId
    attempt: int
    rank: int
    records: StepArray


@dataclass(frozen=True, slots=True)
class Warn:
    """Say in the log that something was not taken."""

    text: str


Effect = Publish | Wake | Decide | DiscardCommits | StoreSteps | Warn


@dataclass(frozen=True, slots=True)
class Applied:
    """The event has happened: `world` is as it left it."""

    world: World
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The event cannot have happened; nothing has changed."""

    reason: str
