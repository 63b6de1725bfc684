"""The gradient noise scale from running means of its two terms, and how far it is to be believed.

Pure arithmetic; knows no trial. Called by `policies.learn.fit`, which keeps the means, and by the estimators of the
ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

MAX_NOISE_SCALE = float(2**20)
_HORIZON = 32
"""Estimates that the means look back: the noise scale grows while a trial learns."""
_WINDOWS = 32
_LEAST = 1e-12
"""Part of its own doubt that a squared norm is at least taken for, so that nothing is divided by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTerms:
    """Means of numerator and denominator of the noise scale, kept apart.

    Attributes:
        noise_trace: mean estimate of tr(Sigma), the per-sample gradient variance.
        grad_sq: mean estimate of |G|^2, the squared norm of the true gradient; may be negative.
        num_estimates: estimates behind the two, capped.
        scatter: mean squared deviation of windows from `grad_sq`, each times its estimates: what is seen of the
            variance of one estimate.
        num_windows: windows behind `scatter`, capped.
    """

    noise_trace: float
    grad_sq: float
    num_estimates: int
    scatter: float
    num_windows: int

    def add(self, noise_trace: float, grad_sq: float, num_estimates: int) -> NoiseTerms:
        """With the means of one more window of `num_estimates` > 0."""
        gain = num_estimates / (self.num_estimates + num_estimates)
        deviation = grad_sq - self.grad_sq
        moved = self.grad_sq + gain * deviation
        num_windows = min(self.num_windows + 1, _WINDOWS)
        squares = num_estimates * deviation * (grad_sq - moved)
        return dataclasses.replace(
            self,
            noise_trace=self.noise_trace + gain * (noise_trace - self.noise_trace),
            grad_sq=moved,
            num_estimates=min(self.num_estimates + num_estimates, _HORIZON),
            scatter=self.scatter + (squares - self.scatter) / num_windows,
            num_windows=num_windows,
        )

    @property
    def scale(self) -> float:
        """tr(Sigma) / |G|^2 in samples, within [1, 2**20].

        The mean of |G|^2 scatters around a small number and may come out negative, what it estimates cannot. Taken is
        the mean of a normal distribution around it, as wide as its doubt, cut off at zero: so an estimate that cannot
        be told from zero says no more than what was seen rules out, and many estimates say what they say.
        """
        return noise_ratio(self.noise_trace, above_zero(self.grad_sq, self.doubt)[0])

    @property
    def bounds(self) -> tuple[float, float]:
        """The scale if |G|^2 were one standard deviation larger, and smaller."""
        mean, deviation = above_zero(self.grad_sq, self.doubt)
        return noise_ratio(self.noise_trace, mean + deviation), noise_ratio(self.noise_trace, mean - deviation)

    @property
    def doubt(self) -> float:
        """About one standard deviation of the mean `grad_sq`.

        As long as few windows were seen, an estimate is taken to scatter as much as its own size, the least it does.
        """
        if not self.num_windows:
            return 0.0
        variance = self.scatter + self.grad_sq**2 / self.num_windows
        return math.sqrt(max(0.0, variance) / self.num_estimates)


def above_zero(mean: float, deviation: float) -> tuple[float, float]:
    """Mean and standard deviation of a normal distribution of which only what lies above zero is possible.

    >>> above_zero(5.0, 0.0)
    (5.0, 0.0)
    >>> [round(value, 3) for value in above_zero(0.0, 1.0)]
    [0.798, 0.603]
    >>> above_zero(-40.0, 1.0)[0] < 0.05
    True
    """
    if deviation <= 0:
        return mean, 0.0
    z = mean / deviation
    if z > 10:
        return mean, deviation
    if z < -10:  # the far tail of a normal distribution is an exponential one
        return deviation / -z, deviation / -z
    hazard = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(-z / math.sqrt(2)))
    variance = max(0.0, 1 - z * hazard - hazard * hazard)
    return max(mean + deviation * hazard, _LEAST * deviation), deviation * math.sqrt(variance)


def noise_ratio(noise_trace: float, grad_sq: float) -> float:
    """The noise scale from its two terms, clamped to [1, 2**20].

    >>> noise_ratio(50.0, 2.0), noise_ratio(-1.0, 2.0), noise_ratio(50.0, -1.0) == 2.0**20
    (25.0, 1.0, True)
    """
    if noise_trace <= 0:
        return 1.0
    if grad_sq * MAX_NOISE_SCALE <= noise_trace:
        return MAX_NOISE_SCALE
    return max(1.0, noise_trace / grad_sq)
