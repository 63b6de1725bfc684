"""The values of a report that the search can use."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from orchestrator.errors import FunctionError


def numbers_in(metrics: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The values that are numbers; that of `metric`, the search's own, must be one.

    Raises:
        FunctionError: it is not, or is missing.
    """
    values = {str(key): float(value) for key, value in metrics.items() if _is_number(value)}
    if metric and metric not in values:
        if metric in metrics:
            kind = type(metrics[metric]).__name__
            raise FunctionError(f"search.metric {metric!r} was reported as a {kind}; allowed: a number")
        names = ", ".join(sorted(map(str, metrics))) or "nothing"
        raise FunctionError(
            f"search.metric {metric!r} is not among the reported values ({names}); report it, or name one of these"
        )
    return values


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, numbers.Real) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)
