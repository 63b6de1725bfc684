"""The heartbeat of one rank: how often something of its work has ended, and how long the next may take.

Beaten by the training thread at each step, batch of an evaluation and batch of data, and while it waits; read by the
thread that sends it. Who receives it judges by a clock of its own, so a process that is stopped, or holds the
interpreter's lock, is found as well. Costs a clock reading and two assignments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.control.orders import Beat

LEAST_S = 10.0
FACTOR = 5.0
"""A rank is silent after so many times its p99 step."""
LONG_S = 600.0
"""What is done once and may take long: a model that is built, a first step, a compilation, a commit."""
_PARTS = {"step": "training", "micro-batch": "training", "evaluation": "evaluation"}
"""What is beaten in turn is timed together."""
_NUM_KEPT, _NUM_KNOWN = 256, 3


class Pulse:
    """Counts what has ended, and keeps how long each of the last took."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._number = 0
        self._doing = "beginning"
        self._began_s = now_s()
        self._took_s: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def begin(self) -> None:
        """A new attempt: what was seen of another trial's steps says nothing of its."""
        self._took_s, self._counts, self._doing = {}, {}, "beginning"
        self._number, self._began_s = self._number + 1, self._now_s()

    def beat(self, doing: str = "step") -> None:
        """A step, or a batch of one kind, has ended."""
        now_s, part = self._now_s(), _PARTS.get(doing)
        if part is not None and _PARTS.get(self._doing) == part:
            kept, count = self._took_s.setdefault(part, []), self._counts.get(part, 0)
            if len(kept) < _NUM_KEPT:
                kept.append(now_s - self._began_s)
            else:
                kept[count % _NUM_KEPT] = now_s - self._began_s
            self._counts[part] = count + 1
        self._doing, self._began_s, self._number = doing, now_s, self._number + 1

    def rest(self, doing: str = "waiting") -> None:
        """It waits for something and is well; to be called again and again meanwhile."""
        self._doing, self._began_s, self._number = doing, self._now_s(), self._number + 1

    def forget(self) -> None:
        """The dials have turned: steps may take longer from here on."""
        self._took_s, self._counts = {}, {}

    @contextmanager
    def long(self, doing: str) -> Iterator[None]:
        """Something that may take long without a beat."""
        before = self._doing
        self.rest(doing)
        try:
            yield
        finally:
            self.rest(before)

    @property
    def view(self) -> Beat:
        """What is sent."""
        return Beat(number=self._number, doing=self._doing, limit_s=self.limit_s)

    @property
    def limit_s(self) -> float:
        """Seconds that may go by without a beat from here on."""
        if self._doing == "waiting":
            return LEAST_S
        took = self._took_s.get(_PARTS.get(self._doing, ""), [])[:]
        if len(took) < _NUM_KNOWN:
            return LONG_S
        return max(LEAST_S, FACTOR * sorted(took)[int(0.99 * (len(took) - 1))])
