"""Search spaces as people write them in Python, in the form of the run file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import ConfigError


def as_distribution(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - anything a user may give
    """What a parameter is drawn from: a list is a choice, Ray Tune's domains and `grid_search` are translated.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, (list, tuple)):
        return {"choice": list(value)}
    if isinstance(value, Mapping):
        return {"grid": list(value["grid_search"])} if "grid_search" in value else dict(value)
    found = _from_tune(value)
    if found is None:
        raise ConfigError(
            f"search.space.{name}: got a {type(value).__name__}; allowed: a list of values, {{uniform: [low, high]}},"
            " {loguniform: ...}, {randint: ...}, {choice: [...]}, {grid: [...]}, or tune.uniform, loguniform, randint,"
            " choice, grid_search"
        )
    return found


def _from_tune(value: Any) -> dict[str, Any] | None:  # noqa: ANN401
    """A domain of Ray Tune, by the names that it has; None for anything else or a form that has no counterpart."""
    kind, sampler = type(value).__name__, type(getattr(value, "sampler", None)).__name__.strip("_")
    if not type(value).__module__.startswith("ray.tune."):
        return None
    if kind == "Categorical":
        return {"choice": list(value.categories)}
    bounds: list[Any] = [getattr(value, "lower", None), getattr(value, "upper", None)]
    if kind == "Float" and sampler in {"Uniform", "LogUniform"}:
        return {sampler.lower(): [float(bound) for bound in bounds]}
    return {"randint": bounds} if kind == "Integer" and sampler == "Uniform" else None
