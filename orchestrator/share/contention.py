"""Whether a trial slows down when a neighbour starts: contention shows what `%smid`, virtual under MPS, does not.

Under the same share and dials a step takes as long as before, whoever computes on other SM groups, but for what L2,
bandwidth and power cost. So a trial is its own reference: its step time beside some neighbours against the one without
them. Nothing is run for this, and training notices nothing. No Ray, no clock; called by `control.checks`.
"""

from __future__ import annotations

from typing import Any

from orchestrator.share.verification import Check, Subject, judge_neighbours, unobservable

MAX_KEYS, MAX_CROWDS = 32, 16
"""Settings per trial, and sets of neighbours per setting, that are remembered; beyond, the oldest go."""

Crowd = frozenset[str]


class Contention:
    """Step times of one trial, by its settings and who was beside it."""

    def __init__(self) -> None:
        self._known: dict[object, dict[Crowd, float]] = {}

    def note(self, key: object, neighbours: Crowd, step_s: float) -> Check:
        """Take in the present step time; what it says, against the best one without at least one of the neighbours.

        Args:
            key: everything that fixes how long a step takes: share, batch, tier, step mode.
            neighbours: trials that compute on the same device now.
            step_s: mean seconds per step since they do, > 0.
        """
        crowds = self._known.pop(key, {})
        crowds.pop(neighbours, None)
        crowds[neighbours] = step_s  # the newest last
        self._known[key] = crowds
        _trim(crowds, MAX_CROWDS)
        _trim(self._known, MAX_KEYS)
        if not neighbours:
            return unobservable(Subject.NEIGHBOURS, "times", "nobody computes beside it")
        others = [(seconds, crowd) for crowd, seconds in crowds.items() if neighbours - crowd]
        if not others:
            reason = f"it has not run with this share and these dials without {', '.join(sorted(neighbours))}"
            return unobservable(Subject.NEIGHBOURS, "times", reason)
        seconds, crowd = min(others, key=lambda other: other[0])
        return judge_neighbours(step_s / seconds, tuple(sorted(neighbours - crowd)))


def _trim(table: dict[Any, Any], limit: int) -> None:
    while len(table) > limit:
        del table[next(iter(table))]
