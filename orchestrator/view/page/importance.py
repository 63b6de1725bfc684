"""How much each searched parameter matters for the metric: Optuna's fANOVA over the trials of a run.

Needs optuna and scikit-learn, and says so where they are missing. Knows nothing of files. Called by `gather`.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.view.page.values import Importance

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MIN_TRIALS = 10
"""Trials with a metric below which the figure would be noise."""
_MAX_TRIALS = 400
"""Trials that are looked at; more take long and change little."""
_LOG_FROM = 100.0
"""A positive parameter whose largest value is this many times its smallest is looked at on a logarithmic scale."""


def importance_of(params: Sequence[Mapping[str, object]], values: Sequence[float]) -> Importance:
    """The share of the metric's variance that each parameter explains.

    Args:
        params: the searched parameters of each trial.
        values: the metric of each of these trials.
    """
    names = sorted({name for one in params for name in one})
    shared = [name for name in names if all(one.get(name) is not None for one in params)]
    varied = [name for name in shared if len({_word(one[name]) for one in params}) > 1]
    left_out = [name for name in names if name not in varied]
    if len(values) < MIN_TRIALS:
        return _none(f"needs {MIN_TRIALS} trials with a value of the metric; there are {len(values)}")
    if len(varied) < 2:
        return _none(f"needs two parameters that differ between trials and that all of them have; found {len(varied)}")
    if len(set(values)) < 2:
        return _none("all trials have the same value of the metric")
    step = math.ceil(len(values) / _MAX_TRIALS)
    rows = [{name: _plain(one[name]) for name in varied} for one in params[::step]]
    try:
        found = _fanova(rows, values[::step])
    except ImportError as error:
        return _none(f"needs optuna and scikit-learn; {error.name} is not installed")
    except (ValueError, RuntimeError) as error:
        return _none(f"could not be computed: {error}")
    note = f"fANOVA (Optuna) over {len(rows)} trials"
    if left_out:
        note += f"; without {', '.join(left_out)}, which not all trials have or which does not differ"
    return Importance(shares=tuple(found.items()), note=note)


def _none(note: str) -> Importance:
    return Importance(shares=(), note=note)


def _fanova(rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, float]:
    import optuna

    importlib.import_module("sklearn")  # fANOVA's forest; where it is missing, the error is to name it

    spaces = {name: _distribution([row[name] for row in rows]) for name in rows[0]}
    rows = [{name: row[name] if _is_range(spaces[name]) else _word(row[name]) for name in row} for row in rows]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.trial.create_trial(params=dict(row), distributions=spaces, value=value)
                for row, value in zip(rows, values, strict=True)
            ]
        )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return {
            name: float(share)
            for name, share in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
        }
    finally:
        optuna.logging.set_verbosity(verbosity)


def _is_range(distribution: BaseDistribution) -> bool:
    return hasattr(distribution, "low")


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """The range of numbers that were seen, or the words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = float(min(values)), float(max(values))
        return FloatDistribution(low, high, log=low > 0 and high >= _LOG_FROM * low)
    return CategoricalDistribution(sorted({_word(value) for value in values}))


def _plain(value: object) -> object:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
