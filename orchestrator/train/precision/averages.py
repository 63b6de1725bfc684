"""Running averages of what steps show for free: the loss, and the length of the gradient before and after a turn.

Numbers only. Used by `guard`, which decides what is far from usual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_KNOWN_LOSSES = 30
_KNOWN_NORMS = 10


@dataclass(slots=True)
class LossAverage:
    """Exponential mean and variance of the loss; forgets all when the settings change."""

    mean: float = 0.0
    variance: float = 0.0
    num: int = 0

    def deviation(self, loss: float) -> float:
        """How many deviations `loss` lies above the average; 0 until that is known."""
        if self.num < _KNOWN_LOSSES or self.variance <= 0:
            return 0.0
        return (loss - self.mean) / math.sqrt(self.variance)

    def add(self, loss: float) -> None:
        """Take in one loss."""
        self.num += 1
        gain = max(1 / self.num, 0.02)
        difference = loss - self.mean
        self.mean += gain * difference
        self.variance = (1 - gain) * (self.variance + gain * difference * difference)


@dataclass(slots=True)
class NormAverage:
    """The usual length of the gradient in this tier, and what it was in the one before."""

    before: float | None = None
    log_mean: float = 0.0
    num: int = 0

    def turned(self, *, is_comparable: bool) -> None:
        """Another tier begins; not comparable if the batch changed too, whose noise is in the length."""
        self.before = self.log_mean if is_comparable and self.num >= _KNOWN_NORMS else None
        self.log_mean, self.num = 0.0, 0

    def add(self, norm: float) -> float | None:
        """Take in one length; returns once how long gradients are against those of the tier before, when known."""
        if not (math.isfinite(norm) and norm > 0):
            return None
        self.num += 1
        self.log_mean += max(1 / self.num, 1 / _KNOWN_NORMS) * (math.log(norm) - self.log_mean)
        if self.num != _KNOWN_NORMS or self.before is None:
            return None
        return math.exp(self.log_mean - self.before)
