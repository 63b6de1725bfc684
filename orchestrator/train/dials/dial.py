"""What a dial is: one setting of a running trial that the policy may change between two steps.

Knows no training and no order. An attempt asks its dials what they can be set to, and sets them in their order at one
step boundary, on every rank before the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits


class Dial(Protocol):
    """One setting of a trial: share, batch or precision."""

    @property
    def name(self) -> str:
        """As in the run file's `dials`."""
        ...

    @property
    def why_off(self) -> str:
        """Why it cannot be changed in this training, empty where it can; shown to the user."""
        ...

    def limits(self, asked: DialLimits) -> DialLimits:
        """The part of the run file's limits that this training can follow."""
        ...

    def prepare(self, asked: Settings) -> Settings:
        """The settings nearest to `asked` that can be applied now, such as those that memory has room for.

        Called by every rank at the same boundary, before anything is changed.
        """
        ...

    def apply(self, grant: Grant, settings: Settings) -> None:
        """Change this dial to `settings`, which `prepare` returned, from the next step on."""
        ...


class Off:
    """A dial that a training does not have. It keeps the start value."""

    def __init__(self, name: str, why_off: str, start: Settings) -> None:
        self.name, self.why_off, self._start = name, why_off, start

    def limits(self, asked: DialLimits) -> DialLimits:
        """The start value only."""
        return held_still(self.name, asked, self._start)

    def prepare(self, asked: Settings) -> Settings:
        """As asked: the plan knows the limits."""
        return asked

    def apply(self, grant: Grant, settings: Settings) -> None:
        """Nothing changes."""


def held_still(name: str, asked: DialLimits, now: Settings) -> DialLimits:
    """The limits with one dial fixed at its value in `now`."""
    match name:
        case "share":
            return replace(asked, min_share=now.share, max_share=now.share)
        case "batch":
            batch = now.global_batch
            return replace(
                asked,
                min_global_batch=batch,
                max_global_batch=batch,
                max_micro_batch=now.micro_batch,
                min_micro_batch=now.micro_batch,
            )
        case "precision":
            return replace(asked, tiers=(now.tier,))
    raise ValueError(f"there is no dial {name!r}; allowed: share, batch, precision")


def limits_of(dials: Sequence[Dial], asked: DialLimits) -> DialLimits:
    """What all dials of a training together can be set to."""
    for dial in dials:
        asked = dial.limits(asked)
    return asked


def reasons_off(dials: Sequence[Dial]) -> dict[str, str]:
    """Name of each dial that this training does not have, and why."""
    return {dial.name: dial.why_off for dial in dials if dial.why_off}


def turn(dials: Sequence[Dial], grant: Grant) -> Settings:
    """Set all dials as a grant asks, as far as they can be; returns the settings that are in force now."""
    settings = grant.settings
    for dial in dials:
        settings = dial.prepare(settings)
    for dial in dials:
        dial.apply(grant, settings)
    return settings
