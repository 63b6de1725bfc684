"""Fewer points for the same picture: largest-triangle-three-buckets, bucket means, and numbers in few digits.

Pure functions of arrays; knows nothing of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_DIGITS = 5


def thinned(x: Floats, y: Floats, num_points: int) -> npt.NDArray[np.int64]:
    """Indices of at most `num_points` points that keep the shape of a curve, the first and the last among them.

    Source: S. Steinarsson, Downsampling Time Series for Visual Representation, 2013: of each bucket the point that
    makes the largest triangle with the one kept before it and the mean of the next bucket.
    """
    count = len(x)
    if count <= num_points or num_points < 3:
        return np.arange(count, dtype=np.int64)[: max(num_points, 0) if count > num_points else count]
    edges = np.linspace(1, count - 1, num_points - 1).astype(np.int64)
    kept = [0]
    for number in range(num_points - 2):
        start, end = int(edges[number]), int(edges[number + 1])
        after = int(edges[number + 2]) if number + 2 < len(edges) else count
        next_x, next_y = float(x[end:after].mean()), float(y[end:after].mean())
        last_x, last_y = float(x[kept[-1]]), float(y[kept[-1]])
        area = np.abs((last_x - next_x) * (y[start:end] - last_y) - (last_x - x[start:end]) * (next_y - last_y))
        kept.append(start + int(np.argmax(area)))
    return np.array([*kept, count - 1], dtype=np.int64)


def bucket_means(t: Floats, values: Floats, edges: Floats) -> Floats:
    """Mean of the values in each bucket between two edges; NaN where it has none."""
    place = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, len(edges) - 2)
    known = np.isfinite(values)
    count = np.bincount(place[known], minlength=len(edges) - 1)
    total = np.bincount(place[known], weights=values[known], minlength=len(edges) - 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bucket_maxima(t: Floats, values: Floats, num_points: int) -> tuple[Floats, Floats]:
    """At most `num_points` runs of points in a row: the time of the first of each, and its largest value."""
    if not len(t):
        return t, values
    starts = np.unique(np.linspace(0, len(t), min(num_points, len(t)), endpoint=False).astype(np.int64))
    return t[starts], np.fmax.reduceat(values, starts)


def plain(values: Iterable[float | None]) -> tuple[float | None, ...]:
    """Numbers in few digits, whole ones as they are; what is not finite becomes None."""
    return tuple(rounded(value) for value in values)


def rounded(value: float | None) -> float | None:
    """A number in five digits, None where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.{_DIGITS}g}")
