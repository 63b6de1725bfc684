"""The account that keeps a process to so many CPU seconds per second of wall time, by sleeping between steps.

A token bucket: wall time earns CPU seconds at the granted rate, the process's CPU time is paid from it. Debt is carried
exactly, however long; credit is bounded, so that time spent idle cannot be saved up for a burst. Knows clocks handed to
it and nothing else. Used by `share.cpu_cores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

BURST_S = 0.1
"""Credit that can be saved up, as seconds of wall time at the granted rate."""

_SHORTEST_SLEEP_S = 0.0005
"""Less than this stays a debt: waking up costs about as much as it would return."""


class DutyCycle:
    """The account of one process.

    Args:
        now_s: monotonic wall time.
        used_s: CPU seconds of the process so far, over all its threads.
        wait: sleeps so many seconds, less when woken.
    """

    def __init__(
        self, now_s: Callable[[], float], used_s: Callable[[], float], wait: Callable[[float], object]
    ) -> None:
        self._now_s, self._used_s, self._wait = now_s, used_s, wait
        self._amount: float | None = None
        self._credit_s = 0.0
        self._charged_s = 0.0
        self._last_now_s = 0.0
        self._last_used_s = 0.0

    @property
    def charged_s(self) -> float:
        """CPU seconds charged so far."""
        return self._charged_s

    @property
    def debt_s(self) -> float:
        """CPU seconds overdrawn at the last settlement, >= 0."""
        return max(0.0, -self._credit_s)

    def set_amount(self, amount: float) -> None:
        """Earn `amount` CPU seconds per second from now on; time up to now is settled at the old rate."""
        if self._amount is None:
            self._last_now_s, self._last_used_s = self._now_s(), self._used_s()
        else:
            self._settle(self._amount)
        self._amount = amount

    def hold_back(self) -> float:
        """Sleep off the debt, if there is one. Returns seconds slept."""
        if self._amount is None:
            return 0.0
        self._settle(self._amount)
        owed_s = -self._credit_s / self._amount
        if owed_s < _SHORTEST_SLEEP_S:
            return 0.0
        began_s = self._now_s()
        self._wait(owed_s)
        # The sleep itself is settled with the next step, by the clock: oversleeping is credit, being woken stays debt.
        return self._now_s() - began_s

    def stop(self) -> None:
        """Forget rate and balance; what was charged stays known."""
        if self._amount is not None:
            self._settle(self._amount)
        self._amount, self._credit_s = None, 0.0

    def _settle(self, amount: float) -> None:
        now_s, used_s = self._now_s(), self._used_s()
        spent_s = used_s - self._last_used_s
        earned_s = amount * (now_s - self._last_now_s)
        self._credit_s = min(self._credit_s + earned_s - spent_s, BURST_S * amount)
        self._charged_s += spent_s
        self._last_now_s, self._last_used_s = now_s, used_s


def num_threads(amount: float) -> int:
    """Compute threads that can use `amount` cores; one unit's rounding error is not another thread."""
    return max(1, math.ceil(amount - 1e-3))
