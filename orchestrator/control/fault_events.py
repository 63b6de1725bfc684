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


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSilent(Event):
    """A rank gave no sign of life for `silent_s`; where `is_restarted`, its process is ended, and so its group.

    Attributes:
        doing: what it last was about.
        process: the state of its process: runs, stopped ...
        stack: where its threads stood, as far as that could be had.
    """

    kind: ClassVar[str] = "rank_silent"
    trial_id: TrialId
    attempt: int
    slot_id: str
    rank: int
    silent_s: float
    limit_s: float
    doing: str
    process: str
    stack: str
    is_restarted: bool
