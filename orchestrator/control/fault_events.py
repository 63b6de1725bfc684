"""Entries of the journal about faults and what was done about them; see `control.events`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.control.events import Event
from orchestrator.policies.plan import TrialId


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitDamaged(Event):
    """An attempt was given a damaged commit: it went on from that of `step`, and does `num_steps` steps again."""

    kind: ClassVar[str] = "commit_damaged"
    trial_id: TrialId
    attempt: int
    checkpoint: str
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRetried(Event):
    """A trial that had failed goes on after all, from `checkpoint` or its beginning; `reason` is why it had failed."""

    kind: ClassVar[str] = "trial_retried"
    trial_id: TrialId
    attempt: int
    checkpoint: str | None
    reason: str
