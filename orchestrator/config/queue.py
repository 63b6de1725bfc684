"""The section `queue` of a run file: whose run it is, how much it counts, and what it was promised."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from orchestrator.config.source import KeyPath
from orchestrator.config.values import Section
from orchestrator.config.words import seen

if TYPE_CHECKING:
    from orchestrator.config.model import RunConfig

MAX_PRIORITY = 1000
_USER = r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}$|^$"


def seconds_of(moment: str) -> float:
    """Seconds since 1970 of a moment such as 2026-12-24T18:00 (local time) or 2026-12-24T18:00+01:00.

    Raises:
        ValueError: it is none.
    """
    return datetime.datetime.fromisoformat(moment).timestamp()


def _moment(value: object) -> object:
    """A moment as text; YAML may have made a date of it."""
    text = value.isoformat() if isinstance(value, datetime.date) else value
    try:
        if text is not None:
            seconds_of(str(text))
    except (ValueError, OverflowError, OSError):
        allowed = "a moment such as 2026-12-24T18:00 (local time) or 2026-12-24T18:00+01:00, or null"
        raise PydanticCustomError("words", f"got {seen(value)}; allowed: {allowed}") from None
    return text


class QueueSection(Section):
    """Whose run it is, how much it counts beside others, and what it was promised."""

    user: str = Field(default="", pattern=_USER, description="whose run it is; quotas are per user")
    priority: int = Field(
        default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="trials of a higher priority are served first"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="how much a trial counts where devices are divided")
    deadline: Annotated[str | None, BeforeValidator(_moment)] = Field(
        default=None, description="when the run should have ended, such as 2026-12-24T18:00; null for no deadline"
    )
    guaranteed_devices: float = Field(
        default=0.0, ge=0, le=1000, description="devices below which a trial is never brought once it has them"
    )
    protected: bool = Field(default=False, description="whether running trials are never paused, moved or resized")
    max_devices: float | None = Field(
        default=None, le=1e6, description="the most devices that all trials of the user hold together; null: no quota"
    )


def check_queue(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """Every contradiction, with the key that it is at."""
    queue = config.queue
    placed = "only with dials.placement, where the policy chooses who has how many devices"
    if queue.max_devices is not None and queue.max_devices < 1:
        text = f"got {queue.max_devices:g}, with which no trial could have a whole device; allowed: at least 1, or null"
        yield ("queue", "max_devices"), text
    elif queue.max_devices is not None and not config.places:
        yield ("queue", "max_devices"), f"got {queue.max_devices:g}; allowed: {placed}"
    if queue.guaranteed_devices and not config.places:
        yield ("queue", "guaranteed_devices"), f"got {queue.guaranteed_devices:g}; allowed: {placed}"
    elif queue.guaranteed_devices > config.most_workers:
        text = f"got {queue.guaranteed_devices:g}, more than a trial can have; allowed: at most {config.most_workers}"
        yield ("queue", "guaranteed_devices"), f"{text}, a device for each of its ranks"


def check_deadline(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """A run that begins now cannot have ended before."""
    deadline = config.queue.deadline
    if deadline is not None and seconds_of(deadline) <= time.time():
        ago = datetime.timedelta(seconds=round(time.time() - seconds_of(deadline)))
        text = f"got {seen(deadline)}, which was {ago} ago; allowed: a moment to come, or null"
        yield ("queue", "deadline"), text
