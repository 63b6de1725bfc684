"""What happens to the world without an entry in the journal: it is asked for again, or measured again, after a crash.

The same kind of values as `control.events`, and applied by the same function. An event belongs here when whoever
told it tells it again to a restarted actor (a wish of the search, telemetry), or when it follows from what is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.control.events import Event
from orchestrator.control.gain import Measurement, Pace
from orchestrator.control.orders import Note, TierReport
from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.plan import TrialId
from orchestrator.policies.snapshot import StepModeView
from orchestrator.share.verification import Check
from orchestrator.telemetry.record import StepArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal(Event):
    """An event that is not written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotExpected(Signal):
    """A slot of that many ranks is being opened."""

    slot_id: str
    num_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotToldToClose(Signal):
    """A slot ends as soon as it is idle."""

    slot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsGivenUp(Signal):
    """No slot will ever open for the run."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportWanted(Signal):
    """The search asks for report `index` of a trial: it has judged those before it."""

    trial_id: TrialId
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReleased(Signal):
    """The search has no further use for a trial."""

    trial_id: TrialId


@dataclass(frozen=True, slots=True, kw_only=True)
class RungOpened(Signal):
    """Nobody is waited for any more at a rung."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportToldAgain(Signal):
    """A search that was started anew was told of a report that it had been told of before."""

    trial_id: TrialId
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsCame(Signal):
    """Step records of a rank."""

    trial_id: TrialId
    rank: int
    records: StepArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersFound(Signal):
    """A trial found out about its tiers."""

    trial_id: TrialId
    report: TierReport


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModeFound(Signal):
    """A trial measured which step mode is the faster with some dials."""

    trial_id: TrialId
    found: StepModeView


@dataclass(frozen=True, slots=True, kw_only=True)
class FitAdvanced(Signal):
    """What is known of a trial's speed and loss, with what was observed since the last time.

    `is_shared` is False where it is not believed, and so is nothing to trials of its shape to come.
    """

    trial_id: TrialId
    fit: TrialFit
    loss: float | None
    is_shared: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceSeen(Signal):
    """The pace of a trial that is about to leave for another slot, and the gain predicted of the move."""

    trial_id: TrialId
    pace: Pace
    predicted: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementBegan(Signal):
    """The gain of a change of dials is measured from here on."""

    trial_id: TrialId
    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckMade(Signal):
    """What was seen of a trial's share or speed."""

    trial_id: TrialId
    check: Check


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialNoted(Signal):
    """Something is amiss with a trial, or is no more."""

    trial_id: TrialId
    note: Note


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSeen(Signal):
    """The search's stand-in of a trial lives a new life, and what it asks for is so already."""

    trial_id: TrialId
    token: str
