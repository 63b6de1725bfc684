"""Time as an argument: the controller and its tests never read a clock themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

_NUM_ROUND_TRIPS = 5


class Clock(Protocol):
    """Where a component reads the time from."""

    def now_s(self) -> float:
        """Monotonic seconds; only differences mean anything."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch, for people and file names; never for leases or decisions."""
        ...


class SystemClock:
    """The machine's own clocks. Monotonic time is the same for every process of one node (CLOCK_MONOTONIC)."""

    def now_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()


Reading = tuple[str, float]
"""Which machine a clock is of (`boot_id`), and its monotonic time."""


@cache
def boot_id() -> str:
    """What all processes of one running system have in common, with their monotonic clock; empty if not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_clock() -> Reading:
    """The clock of this machine."""
    return boot_id(), time.monotonic()


def offset_to(ask: Callable[[], Reading], here: Callable[[], Reading] = read_clock) -> float:
    """What to add to a time of this machine's clock to have it on that of the machine that answers `ask`.

    0 where both are the same machine. Else the answer is taken to have been given in the middle of its round trip; the
    shortest of a few counts, so the error is at most half of that.
    """
    best_s, offset_s = float("inf"), 0.0
    for _ in range(_NUM_ROUND_TRIPS):
        own_id, before_s = here()
        their_id, there_s = ask()
        _, after_s = here()
        if own_id and own_id == their_id:
            return 0.0
        if after_s - before_s < best_s:
            best_s, offset_s = after_s - before_s, there_s - (before_s + after_s) / 2
    return offset_s


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        """Seconds advanced so far."""
        return self._now_s

    def wall_s(self) -> float:
        """The same as `now_s`: a replay has no calendar."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move time forward by `seconds` >= 0."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds} would move time back; allowed: >= 0")
        self._now_s += seconds
