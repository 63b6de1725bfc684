"""The formulas of goodput: throughput times statistical efficiency. Nothing here measures or decides.

Called by `policies.decide.fitted` for every prediction and by the reports that explain one.
"""

from __future__ import annotations


def efficiency(noise_scale: float | None, base_batch: int, global_batch: int) -> float:
    """Progress per sample at `global_batch` relative to `base_batch`: (phi + B0) / (phi + B).

    In (0, 1] from the base batch up, above 1 below it. Where the noise scale phi is not known, phi = 0 is assumed
    above the base batch (a larger batch makes no further progress) and no gain below it: never a promise.

    Source: Pollux (OSDI 2021), section 3.1, after McCandlish et al. 2018 (arXiv 1812.06162).

    >>> efficiency(100.0, 32, 32)
    1.0
    >>> round(efficiency(100.0, 32, 64), 4)
    0.8049
    >>> efficiency(None, 32, 64), efficiency(None, 32, 16)
    (0.5, 1.0)
    """
    _check_batches(base_batch, global_batch)
    if noise_scale is None:
        return min(1.0, base_batch / global_batch)
    return (noise_scale + base_batch) / (noise_scale + global_batch)


def gain(noise_scale: float, base_batch: int, global_batch: int) -> float:
    """Steps at `base_batch` that one step at `global_batch` is worth: (phi/B0 + 1) / (phi/B + 1).

    Equals efficiency times B/B0; lies between 1 (no noise) and B/B0 (all noise) for B >= B0.

    Source: AdaScale SGD (ICML 2020, arXiv 2007.05105), the gain ratio, with the variance
    at B0 written as phi |G|^2 / B0.

    >>> gain(0.0, 32, 64)
    1.0
    >>> round(gain(1e9, 32, 64), 6)
    2.0
    >>> round(gain(100.0, 32, 64) / (efficiency(100.0, 32, 64) * 2), 12)
    1.0
    """
    _check_batches(base_batch, global_batch)
    return (noise_scale / base_batch + 1) / (noise_scale / global_batch + 1)


def goodput(throughput_per_s: float, noise_scale: float | None, base_batch: int, global_batch: int) -> float:
    """Samples per second of useful progress, in samples of the base batch.

    Source: Pollux (OSDI 2021), definition 3.1.

    >>> round(goodput(1000.0, 100.0, 32, 64), 1)
    804.9
    """
    return throughput_per_s * efficiency(noise_scale, base_batch, global_batch)


def _check_batches(base_batch: int, global_batch: int) -> None:
    if base_batch < 1 or global_batch < 1:
        raise ValueError(
            f"efficiency of base_batch={base_batch}, global_batch={global_batch}; both must be >= 1 sample: "
            "pass the product of micro_batch, grad_accum and num_workers"
        )
