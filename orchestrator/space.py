"""Search spaces: as people write them in Python, and as functions of Optuna's trial.

`as_space` translates what `orchestrator.run` takes into the form of the run file. `Define` is the other way round: it
draws from the run file's spaces by asking a trial of Optuna, for where Ray Tune's own form is not enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.space import Distribution
from orchestrator.config.space import as_distribution as distribution_of
from orchestrator.errors import ConfigError
from orchestrator.jobs.own import UserCodeError, load


def as_space(space: Any) -> Any:  # noqa: ANN401 - anything a user may give
    """A mapping of names, or a list of such, in the form of the run file; anything else as it is.

    Raises:
        ConfigError: a value is no distribution.
    """
    if isinstance(space, Mapping):
        return {key: as_distribution(key, value) for key, value in space.items()}
    return [as_space(each) for each in space] if isinstance(space, list | tuple) else space


def as_distribution(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - anything a user may give
    """What a parameter is drawn from: a list is a choice, Ray Tune's domains and `grid_search` are translated.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, (list, tuple)):
        return {"choice": [_plain(each) for each in value]}
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {"grid": list(value["grid_search"])} if "grid_search" in value else _plain(value)
        is_nested = bool(plain) and not set(plain) & set(Distribution.model_fields)
        return {"choice": [plain]} if is_nested and _holds_distribution(plain) else plain
    found = _from_tune(value)
    if found is None:
        raise ConfigError(
            f"search.space.{name}: got a {type(value).__name__}; allowed: a list of values, {{uniform: [low, high]}},"
            " {loguniform: ...}, {randint: ...}, {choice: [...]}, {grid: [...]}, or tune.uniform, loguniform, randint,"
            " choice, grid_search; or for the whole space a function of Optuna's trial"
        )
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A listed value with the domains of Ray Tune that are in it translated."""
    found = _from_tune(value)
    if found is not None:
        return found
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _holds_distribution(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, Mapping):
        is_one = len(value) == 1 and next(iter(value)) in Distribution.model_fields
        return is_one or any(_holds_distribution(part) for part in value.values())
    return isinstance(value, list) and any(_holds_distribution(part) for part in value)


def _from_tune(value: Any) -> dict[str, Any] | None:  # noqa: ANN401
    """A domain of Ray Tune, by the names that it has; None for anything else or a form that has no counterpart."""
    kind, sampler = type(value).__name__, type(getattr(value, "sampler", None)).__name__.strip("_")
    if not type(value).__module__.startswith("ray.tune."):
        return None
    if kind == "Categorical":
        return {"choice": [_plain(each) for each in value.categories]}
    bounds: list[Any] = [getattr(value, "lower", None), getattr(value, "upper", None)]
    if kind == "Float" and sampler in {"Uniform", "LogUniform"}:
        return {sampler.lower(): [float(bound) for bound in bounds]}
    return {"randint": bounds} if kind == "Integer" and sampler == "Uniform" else None


@dataclass(frozen=True, slots=True)
class Define:
    """Draws the parameters of a trial by asking a trial of Optuna. Optuna's searcher pickles it with its state.

    Attributes:
        spaces: one of which is drawn from, and in it all distributions, also those inside of others; or none.
        path: import path of a function that draws instead.
    """

    spaces: Sequence[Mapping[str, Distribution]] = ()
    path: str = ""

    def __call__(self, trial: Any) -> dict[str, Any]:  # noqa: ANN401 - Optuna's
        """The parameters: those that a function returns, or where it returns nothing those that it asked for.

        Raises:
            UserCodeError: the function is not there, or returns something else.
        """
        if self.path:
            return self._called(trial)
        is_one = len(self.spaces) == 1
        number = 0 if is_one else trial.suggest_categorical("space", list(range(len(self.spaces))))
        prefix = "" if is_one else f"space{number}."
        return {name: _drawn(trial, f"{prefix}{name}", each) for name, each in self.spaces[number].items()}

    def _called(self, trial: Any) -> dict[str, Any]:  # noqa: ANN401 - Optuna's
        found = load(self.path)(trial)
        if found is not None and not isinstance(found, Mapping):
            text = f"{self.path} returned a {type(found).__name__}; allowed: a dict of parameters, or nothing"
            raise UserCodeError(text)
        return dict(trial.params if found is None else found)


def as_whole(name: str, define: Define, trial: Any) -> dict[str, Any]:  # noqa: ANN401 - Optuna's
    """All that is drawn under one name."""
    return {name: define(trial)}


def first_drawn(path: str) -> dict[str, Any]:
    """What the function at an import path draws first, in no study that counts."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        return Define(path=path)(study.ask())
    finally:
        optuna.logging.set_verbosity(verbosity)


def _drawn(trial: Any, name: str, distribution: Distribution) -> Any:  # noqa: ANN401 - Optuna's, plain data
    low_high = distribution.uniform or distribution.loguniform
    if low_high is not None:
        return trial.suggest_float(name, *low_high, log=distribution.loguniform is not None)
    if distribution.randint is not None:
        return trial.suggest_int(name, distribution.randint[0], distribution.randint[1] - 1)
    # Optuna keeps plain values only, so a choice among others is one among their numbers.
    chosen = trial.suggest_categorical(name, list(range(len(distribution.values))))
    return _resolved(trial, f"{name}[{chosen}]", distribution.values[chosen])


def _resolved(trial: Any, name: str, value: Any) -> Any:  # noqa: ANN401
    """A listed value with the distributions in it drawn."""
    found = distribution_of(value)
    if found is not None:
        return _drawn(trial, name, found)
    if isinstance(value, dict):
        return {key: _resolved(trial, f"{name}.{key}", part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(trial, f"{name}.{number}", part) for number, part in enumerate(value)]
    return value
