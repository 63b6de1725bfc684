"""How likely a trial of a search survives its next rung, from where it stands among the others.

Arithmetic only: the simulated search and a live run ask the same functions. Losses: lower is better.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

LEAST, MOST = 0.01, 0.99
"""Nobody is given up for certain, and nobody is certain to go on."""
_RANK_NOISE = 0.15
"""How far places move between two rungs, as a part of those that are compared."""
_MAX_EXPONENT = 700.0


def rungs(grace_reports: int, reduction_factor: int, max_reports: int) -> tuple[int, ...]:
    """Numbers of reports at which successive halving compares trials, the last report excluded."""
    found, rung = [], grace_reports
    while rung < max_reports:
        found.append(rung)
        rung *= reduction_factor
    return tuple(found)


def place(losses: Sequence[float], loss: float) -> float:
    """Part of some losses (ascending) that is better: 0 for the best, and where there are none."""
    return bisect_left(losses, loss) / len(losses) if losses else 0.0


def bounded(probability: float) -> float:
    """A probability, kept off 0 and 1."""
    return min(MOST, max(LEAST, probability))


def chance(behind: float, keeps: float) -> float:
    """Probability to be among the part `keeps` of those judged at a rung, where the part `behind` is better by now.

    Ranks keep with some noise: even at `behind == keeps`.
    """
    return bounded(1 / (1 + math.exp(min(_MAX_EXPONENT, (behind - keeps) / _RANK_NOISE))))


def chance_after_rung(losses: Sequence[float], loss: float, reduction_factor: int) -> float:
    """The same for a trial that went on from a rung of successive halving, for the next one.

    `losses` are those of all that were judged at the rung, ascending. The best of them, one in `reduction_factor`, are
    those that get as far as the next rung.
    """
    return chance(place(losses, loss) * reduction_factor, 1 / reduction_factor)
