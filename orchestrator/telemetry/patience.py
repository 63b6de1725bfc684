"""Calls into a library that may never return, made so that the caller goes on after a while.

A hung C call cannot be ended from Python; it can be left behind on a thread of its own. Knows nothing of NVML, which is
what it is for. Used by `telemetry.sampler`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 60.0


@dataclass(slots=True)
class _Call(Generic[T]):
    """A call that runs on a thread of its own."""

    run: Callable[[], T]
    result: T | None = None
    is_done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Run, on a thread that does not keep the process alive."""
        threading.Thread(target=self._work, name="patience", daemon=True).start()

    def _work(self) -> None:
        try:
            self.result = self.run()
        finally:
            self.is_done.set()


class Patience:
    """Waits for a call only so long, has at most one unfinished, and after a hang tries ever more rarely.

    Args:
        timeout_s: how long a call is waited for.
        now_s: monotonic time, for the back-off.
    """

    def __init__(self, timeout_s: float, now_s: Callable[[], float]) -> None:
        self._timeout_s, self._now_s = timeout_s, now_s
        self._stuck: threading.Event | None = None
        self._backoff_s, self._retry_at_s = FIRST_BACKOFF_S, -math.inf

    def call(self, run: Callable[[], T]) -> T | None:
        """What `run` returns; None if it does not return in time, raises, or if it is too early to try again."""
        if self._stuck is not None and not self._stuck.is_set():
            return None
        if self._now_s() < self._retry_at_s:
            return None
        call = _Call(run)
        call.start()
        if call.is_done.wait(self._timeout_s):
            self._stuck, self._backoff_s = None, FIRST_BACKOFF_S
            return call.result
        self._stuck = call.is_done
        self._retry_at_s = self._now_s() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        return None
