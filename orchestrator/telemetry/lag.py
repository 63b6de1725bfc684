"""How far behind the actor's clock a trial's own clock tells the time, once messages that waited are set aside."""

from __future__ import annotations

from collections import deque

_WINDOW_S = 10.0
_KNOWN_S = 5.0


class ClockLag:
    """Arrivals of the last seconds: what came soonest after its step had ended says how the clocks differ."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, ended_s: float) -> None:
        """A message arrived whose last step had ended, by the trial's clock, at `ended_s`."""
        self._seen.append((now_s, now_s - ended_s))
        while self._seen[0][0] < now_s - _WINDOW_S:
            self._seen.popleft()

    @property
    def lag_s(self) -> float:
        """The least of the last seconds; 0 before there are enough of them."""
        if not self._seen or self._seen[-1][0] - self._seen[0][0] < _KNOWN_S:
            return 0.0
        return min(lag_s for _, lag_s in self._seen)
