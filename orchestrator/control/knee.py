"""How many trials of a kind share a GPU: found by trying, remembered per shape.

More trials at a time raise the sum of what they learn until the card is full; beyond that knee they only slow each
other. So their number is doubled while the measured sum rises, and where it no longer does the numbers in between are
halved. Too many cost memory and little else where kernels of all run side by side, too few leave the card idle: the
search begins with several, and learns of fewer from the times in which fewer happen to run. Pure bookkeeping over
measured rates; no Ray, no files. Called by the controller when it assigns trials.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable
from dataclasses import dataclass, field

SETTLE_S = 3.0
"""Seconds after a trial came or went in which rates still move."""

NUM_READINGS = 3
"""Readings, a second apart, behind the sum of one number of trials."""

MIN_GAIN = 0.03
"""Part by which more trials must raise the sum to be worth their memory."""

FIRST_LIMIT = 4
"""By hand two to eight small models fill a card, and four came within a few percent of the best of them."""


@dataclass(slots=True)
class _Search:
    """What is known of one shape: the newest sum for each number of trials, and how many may run now.

    `dials` are those behind `sums` where all trials had the same ones: sums under other dials say nothing of a number.
    """

    limit: int = FIRST_LIMIT
    sums: dict[int, float] = field(default_factory=dict)
    dials: Hashable = None
    is_found: bool = False

    @property
    def worthy(self) -> int:
        """The smallest number whose sum is as good as the best."""
        best = max(self.sums.values())
        return min(number for number, value in self.sums.items() if value * (1 + MIN_GAIN) >= best)


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

    def observe(
        self, now_s: float, shape: str, rates: list[float | None], count: int | None, dials: Hashable = None
    ) -> str | None:
        """Take a reading of all trials that run, all of one shape; says what follows from it, None if nothing does.

        Args:
            now_s: monotonic.
            shape: of all of them.
            rates: useful samples per second of each; None for one that has none yet.
            count: how many of them run on each device; None where that is not the same number everywhere.
            dials: batch and tier of all of them; None where they differ.
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
        if search.is_found:
            return self._step_back(search, count, total, dials)
        search.dials = dials if not search.sums or dials == search.dials else None
        search.sums[count] = total
        return self._step(search, count) if count >= search.limit else None

    @staticmethod
    def _step(search: _Search, count: int) -> str | None:
        """Twice as many while the sum rises; else between the best number and the next that was no better."""
        worthy, before = search.worthy, search.limit
        beyond = min((number for number in search.sums if number > worthy), default=3 * worthy)
        search.limit = (worthy + beyond) // 2
        if search.limit == worthy:
            search.is_found = True
            return _words(search)
        if search.limit == before:
            return None  # more than that run until some end
        return f"{count} trials make {search.sums[count]:.0f} samples/s together; trying {search.limit}"

    @staticmethod
    def _step_back(search: _Search, count: int, total: float, dials: Hashable) -> str | None:
        """Fewer than what was found, where they happen to run and are as good under the same dials."""
        if dials is None:
            return None
        if dials != search.dials:
            search.dials, search.sums = dials, {}
        search.sums[count] = total
        if search.limit not in search.sums or count >= search.limit or search.worthy >= search.limit:
            return None
        search.limit = search.worthy
        return _words(search)


def _words(search: _Search) -> str:
    sums = ", ".join(f"{number}: {value:.0f}" for number, value in sorted(search.sums.items()))
    return f"the knee is {search.limit} trials at a time (samples/s together by number: {sums})"


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
