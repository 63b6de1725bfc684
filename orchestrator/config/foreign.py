"""Keys that other tools have for what a run file says, and what a run file says instead.

Read only where a key is unknown: nothing is accepted in another tool's words, because their meaning differs in details.
Knows the words of Weights & Biases, Optuna, Ray Tune, Ax, Keras Tuner, NNI and Hydra.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.config.words import printable

ELSEWHERE = {
    "parameters": "search.space",
    "param_space": "search.space",
    "search_space": "search.space",
    "hyperparameters": "search.space",
    "n_trials": "search.num_trials",
    "num_samples": "search.num_trials",
    "max_trials": "search.num_trials",
    "run_cap": "search.num_trials",
    "max_concurrent_trials": "search.max_concurrent",
    "method": "search.algorithm",
    "sampler": "search.algorithm",
    "search_alg": "search.algorithm",
    "early_terminate": "search.scheduler",
    "pruner": "search.scheduler",
}
"""Keys of whole searches -> where a run file says it."""

_LOW, _HIGH = ("min", "low", "lower", "min_value"), ("max", "high", "upper", "max_value")
_LISTED = ("values", "choices", "categories", "options", "_value")
_KINDS = ("distribution", "_type", "type", "sampling", "log", "log_scale", "step", "q", "bounds", "value", "base", "mu")
_ALL = frozenset((*_LOW, *_HIGH, *_LISTED, *_KINDS))


def distribution_in_our_words(data: Mapping[str, object]) -> str | None:
    """What to write instead of a distribution in another tool's words, None where it is in nobody's."""
    if not data or not all(isinstance(key, str) and key in _ALL for key in data):
        return None
    keys = ", ".join(printable(key, 20) for key in data)
    return f"got the keys {keys}, which are another tool's; write {_translated(data)}"


def _translated(data: Mapping[str, object]) -> str:
    listed = next((data[key] for key in _LISTED if isinstance(data.get(key), list)), None)
    bounds = data.get("bounds", listed)
    low, high = _first(data, _LOW), _first(data, _HIGH)
    words = " ".join(str(data.get(key, "")).lower() for key in ("distribution", "_type", "type", "sampling"))
    is_range = "uniform" in words or "int" in words.split("_") or words.strip() in {"range", "float", "int"}
    if low is None and isinstance(bounds, list) and len(bounds) == 2 and (is_range or "bounds" in data):
        low, high = bounds
    if _is_number(low) and _is_number(high):
        is_log = "log" in words or data.get("log") is True or data.get("log_scale") is True
        if is_log:
            return f"{{loguniform: [{low}, {high}]}}"
        if isinstance(low, int) and isinstance(high, int) and "float" not in words and words.strip() != "uniform":
            return f"{{randint: [{low}, {high + 1}]}}, whose upper end is excluded"
        return f"{{uniform: [{low}, {high}]}}"
    if listed is not None:
        return f"{{choice: {_shown(listed)}}}, or {{grid: ...}} to try each"
    if "value" in data:
        return "a single value under job.params"
    return "one of {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]}, {choice: [a, b]}"


def _first(data: Mapping[str, object], names: tuple[str, ...]) -> object:
    return next((data[name] for name in names if name in data), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(values: object) -> str:
    assert isinstance(values, list)
    return printable("[" + ", ".join(str(value) for value in values) + "]", 80)
