"""What somebody knows of a trial without measuring it: its speed as a model, and its gradient noise scale.

For simulators of others, where both are given. What is known counts at once, however few observations there are, and
whatever was measured besides. A value only; `known_fit` puts it into what a policy sees.
"""

from __future__ import annotations

import dataclasses

from orchestrator.policies.learn.fit import NOTHING_FITTED, TrialFit
from orchestrator.policies.learn.noise import MAX_NOISE_SCALE
from orchestrator.policies.learn.speed import KnownSpeed

_NUM_ESTIMATES = 32
"""As many as the running mean looks back."""


def known_fit(
    *, speed: KnownSpeed | None = None, noise_scale: float | None = None, fit: TrialFit = NOTHING_FITTED
) -> TrialFit:
    """`fit` with a speed model and a noise scale in samples that are known; None leaves either to measurement.

    >>> from orchestrator.policies.learn.fit import noise_scale
    >>> noise_scale(known_fit(noise_scale=800.0))
    800.0

    Raises:
        ValueError: the noise scale is not within [1, 2**20].
    """
    if speed is not None:
        fit = dataclasses.replace(fit, known_speed=speed)
    if noise_scale is None:
        return fit
    if not 1 <= noise_scale <= MAX_NOISE_SCALE:
        raise ValueError(f"noise_scale={noise_scale!r}; allowed: samples, 1 to {MAX_NOISE_SCALE:.0f}")
    return dataclasses.replace(
        fit,
        noise_trace=float(noise_scale),
        grad_sq=1.0,
        num_noise=_NUM_ESTIMATES,
        grad_sq_scatter=0.0,
        num_noise_windows=0,
    )
