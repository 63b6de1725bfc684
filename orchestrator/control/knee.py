"""How many trials of a kind share a GPU: found by trying, remembered per shape.

More trials at a time raise the sum of what they learn until the card is full; beyond that knee they only slow each
other. So one more is admitted while the measured sum rises, and where it no longer does the best number stays. Pure
bookkeeping over measured rates; no Ray, no files. Called by the controller when it assigns trials.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

SETTLE_S = 3.0
"""Seconds after a trial came or went in which rates still move."""

NUM_READINGS = 3
"""Readings, a second apart, behind the sum of one number of trials."""

MIN_GAIN = 0.03
"""Part by which one more trial must raise the sum to be worth its memory."""

FIRST_LIMIT = 2


@dataclass(slots=True)
class _Search:
    """What is known of one shape: the best sum for each number of trials, and how many may run now."""

    limit: int = FIRST_LIMIT
    sums: dict[int, float] = field(default_factory=dict)
    is_found: bool = False


class Knee:
    """The number of trials to run at a time on one kind of device.

    Args:
        known: numbers found in earlier runs, by shape.
    """

    def __init__(self, known: dict[str, int] | None = None) -> None:
        self._searches = {
            shape: _Search(limit=count, is_found=True) for shape, count in (known or {}).items() if count >= 1
        }
        self._running = 0
        self._changed_s = 0.0
        self._readings: list[float] = []

    def limit(self, shape: str) -> int:
        """How many trials may run now, where the next one is of that shape."""
        return self._searches.setdefault(shape, _Search()).limit

    @property
    def found(self) -> dict[str, int]:
        """Numbers that were found, by shape."""
        return {shape: search.limit for shape, search in sorted(self._searches.items()) if search.is_found}

    def observe(self, now_s: float, shape: str, rates: list[float | None], count: int | None) -> str | None:
        """Take a reading of all trials that run, all of one shape; says what follows from it, None if nothing does.

        Args:
            now_s: monotonic.
            shape: of all of them.
            rates: useful samples per second of each; None for one that has none yet.
            count: how many of them run on each device; None where that is not the same number everywhere.
        """
        search = self._searches.setdefault(shape, _Search())
        if len(rates) != self._running:
            self._running, self._changed_s, self._readings = len(rates), now_s, []
        known = [rate for rate in rates if rate is not None]
        if len(known) < len(rates) or now_s - self._changed_s < SETTLE_S:
            return None
        self._readings.append(sum(known))
        if len(self._readings) < NUM_READINGS:
            return None
        total, self._readings = statistics.median(self._readings), []
        if count is None:
            return None
        search.sums[count] = total
        if search.is_found or count < search.limit:
            return None
        return self._step(search, count)

    @staticmethod
    def _step(search: _Search, count: int) -> str:
        """One more trial while the sum rises; else back to the best number."""
        best = max(search.sums.values())
        worthy = min(number for number, value in search.sums.items() if value * (1 + MIN_GAIN) >= best)
        if worthy == count:
            search.limit = count + 1
            return f"{count} trials make {search.sums[count]:.0f} samples/s together; trying {count + 1}"
        search.limit, search.is_found = worthy, True
        sums = ", ".join(f"{number}: {value:.0f}" for number, value in sorted(search.sums.items()))
        return f"the knee is {worthy} trials at a time (samples/s together by number: {sums})"


def affordable(free_bytes: int, peak_bytes: int | None, running: int) -> int:
    """Trials that memory allows in all, those that run included; one at a time before a peak was measured.

    Args:
        free_bytes: memory that nobody uses now.
        peak_bytes: the most a trial of the shape has used so far, None where nothing is known.
        running: trials that run now.
    """
    if peak_bytes is None or peak_bytes <= 0:
        return max(1, running)
    return running + max(0, free_bytes // peak_bytes)
