"""The entry of the journal for what somebody asked of a running run; the other entries are in `events`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from orchestrator.control.events import IN_JOURNAL, RAW, Event
from orchestrator.policies.plan import TrialId


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTaken(Event):
    """Somebody's request was done: `by` says whose. What follows for trials has entries of its own.

    Attributes:
        request_id: under which it is done once.
        by: who asked.
        command: add, clone, stop, pause, resume or set.
        trial_id: the trial that it is about, one that was made for it among them; empty for the run.
        values: parameters or terms, by name.
    """

    kind: ClassVar[str] = "request"
    request_id: str
    by: str
    command: str
    trial_id: TrialId
    values: Mapping[str, Any] = field(metadata={IN_JOURNAL: RAW})
