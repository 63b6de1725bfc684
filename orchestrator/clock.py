"""Time as an argument: the controller and its tests never read a clock themselves."""

from __future__ import annotations

import time
from typing import Protocol


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
