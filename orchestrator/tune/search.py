"""The Ray Tune search of a run: its space, its scheduler, and `fit()` in a thread of its own.

The search allocates nothing: its stand-ins reserve a sliver of the head node, and slots hold the compute.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.basic_variant import BasicVariantGenerator

from orchestrator.config.model import (
    AshaScheduler,
    HyperbandScheduler,
    MedianScheduler,
    PbtScheduler,
    RunConfig,
)
from orchestrator.config.search_checks import mutable_params
from orchestrator.config.space import Distribution, as_distribution
from orchestrator.errors import UnfitEnvironmentError
from orchestrator.space import Define, as_whole
from orchestrator.tune.adapter import (
    LIVE,
    WHOLE,
    Interrupter,
    SlotTrial,
    StopForwarder,
    TrialFailedError,
    within,
)
from orchestrator.tune.admission import HEAD, PIN_HEAD, sliver

logger = logging.getLogger(__name__)

_DIRECTORY = "tune"
_STATE_PREFIX = "experiment_state"
_WORST = 1e30
"""For a metric that is no number: worse than any, and still one that percentiles and means can be taken of."""

_TUNES_LOGGERS = ("ray.tune.execution.tune_controller", "ray.tune.tune")

_SNAPSHOT_PERIOD_S = 2.0
"""As `orchestrator.cluster` tells Tune."""


class Search:
    """One search; `start` returns at once, `is_over` says when it has ended."""

    def __init__(self, config: RunConfig, metric: str, mode: str, storage_path: str) -> None:
        self._config, self._metric, self._mode, self._storage_path = config, metric, mode, storage_path
        self._directory = str(Path(storage_path) / _DIRECTORY)
        self._thread: threading.Thread | None = None
        self._frozen: dict[str, bytes] = {}
        self.error: str | None = None

    def start(self, policy: Any, actor_name: str, namespace: str) -> None:
        """Begin the search with the policy actor of that name, or take it up where Tune's own state left it."""
        LIVE.policy = policy
        LIVE.is_interrupted.clear()
        tuner = self._tuner(actor_name, namespace)
        self._thread = threading.Thread(target=self._fit, args=(tuner,), name="search", daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        """Remember Tune's own state, fresh from now, with its trials unfinished; put back when the search has ended.

        Tune marks the trials of a search that it is told to end as finished, and would not take them up again.
        """
        if self._is_simple:
            return
        asked_s = time.time()
        deadline_s = time.monotonic() + 3 * _SNAPSHOT_PERIOD_S
        while time.monotonic() < deadline_s:
            files = list(self._state_files())
            if any(path.name.startswith(_STATE_PREFIX) and path.stat().st_mtime > asked_s for path in files):
                break
            time.sleep(0.1)
        time.sleep(0.2)  # the searcher's file is written after the trials'
        self._frozen = {path.name: path.read_bytes() for path in self._state_files()}

    def interrupt(self) -> None:
        """End the search soon; its trials are not marked as finished by us."""
        LIVE.is_interrupted.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the search; whether it came."""
        assert self._thread is not None
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def thaw(self) -> None:
        """Put Tune's state back as it was when it was frozen, for `resume`."""
        if not self._frozen:
            return
        for path in self._state_files():
            if path.name not in self._frozen:
                path.unlink()
        for name, data in self._frozen.items():
            (Path(self._directory) / name).write_bytes(data)

    def _state_files(self) -> Iterator[Path]:
        """Tune's files of the whole search, not those of its trials."""
        directory = Path(self._directory)
        return (path for path in directory.glob("*") if path.is_file() and not path.name.startswith("tmp"))

    def _fit(self, tuner: tune.Tuner) -> None:
        for name in _TUNES_LOGGERS:
            logging.getLogger(name).addFilter(_is_news)
        try:
            tuner.fit()
        except Exception as error:
            logger.exception("the search failed")
            self.error = f"{type(error).__name__}: {error}"

    def _tuner(self, actor_name: str, namespace: str) -> tune.Tuner:
        search = self._config.search
        part = PIN_HEAD[HEAD] if self._is_simple else sliver(search.num_slots, ray.available_resources().get(HEAD, 0.0))
        worst = (self._metric, -_WORST if self._mode == "max" else _WORST)
        trainable = tune.with_resources(
            tune.with_parameters(
                SlotTrial, actor=actor_name, namespace=namespace, worst=worst, bounds=bounds_of(search.one_space)
            ),
            {HEAD: part},
        )
        if not self._is_simple and tune.Tuner.can_restore(self._directory):
            # Trials that are not tried again fail at once with the reason that the journal has.
            return tune.Tuner.restore(self._directory, trainable=trainable, resume_errored=True)
        return tune.Tuner(
            trainable,
            param_space=self._space(),
            tune_config=tune.TuneConfig(
                metric=self._metric,
                mode=self._mode,
                num_samples=math.ceil(search.num_trials / search.grid_points),
                scheduler=scheduler_of(self._config),
                search_alg=self._searcher(),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=_DIRECTORY,
                storage_path=self._storage_path,
                callbacks=[StopForwarder()],
                stop=Interrupter(),
                failure_config=tune.FailureConfig(max_failures=0),
                # Tune's default for classes is True; where no trial is taken up again its state need not be kept twice.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=not self._is_simple),
                verbose=0,
            ),
        )

    @property
    def _is_simple(self) -> bool:
        """Whether the search can be begun anew and repeats itself: its trials then find their reports in the journal.

        Otherwise (it pauses trials, perturbs them, or learns from them) it is taken up from Tune's own state.
        """
        search = self._config.search
        is_drawn_here = search.algorithm != "optuna" and not isinstance(search.space, str)
        return is_drawn_here and search.scheduler.name in {"asha", "fifo", "median"}

    def _space(self) -> dict[str, Any]:
        """Ray Tune's form of the space; empty where a function draws by asking Optuna."""
        search = self._config.search
        if self._define() is not None:
            return {}
        spaces = [{name: domain(distribution) for name, distribution in space.items()} for space in search.spaces]
        return spaces[0] if len(spaces) == 1 else {WHOLE: tune.choice(spaces)}

    def _define(self) -> Define | None:
        """What draws by asking Optuna: the user's function, or one for spaces that Optuna has no form for."""
        search = self._config.search
        if isinstance(search.space, str):
            return Define(path=search.space)
        is_plain = len(search.spaces) == 1 and not any(_is_nested(each) for each in search.one_space.values())
        return None if is_plain or search.algorithm != "optuna" else Define(spaces=search.spaces)

    def _searcher(self) -> Any:
        search, seed, define_by_run = self._config.search, self._config.seed, self._define()
        if search.algorithm == "optuna" or define_by_run is not None:
            from ray.tune.search.optuna import OptunaSearch

            sampler = optuna_sampler(seed, is_random=search.algorithm == "random")
            if define_by_run is None:
                return OptunaSearch(sampler=sampler)
            ask = partial(as_whole, WHOLE, define_by_run)
            return OptunaSearch(space=ask, metric=self._metric, mode=self._mode, sampler=sampler)
        return BasicVariantGenerator(random_state=seed, max_concurrent=search.num_slots if self._is_simple else 0)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Ray Tune's says more than that a trial failed, with a traceback of our stand-in.

    The report says that with the user's own.
    """
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    is_known = error is not None and TrialFailedError.__name__ in str(error)
    return not is_known and not str(record.msg).startswith("Trials did not complete")


def optuna_sampler(seed: int, *, is_random: bool = False) -> Any:
    """Optuna's default sampler with a seed, or one that learns nothing; quiet.

    Raises:
        UnfitEnvironmentError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UnfitEnvironmentError(
            "search.algorithm optuna needs Optuna: pip install 'ray-orchestrator[optuna]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.samplers.RandomSampler(seed=seed) if is_random else optuna.samplers.TPESampler(seed=seed)


def _is_nested(distribution: Distribution) -> bool:
    """Whether Optuna's own form would not do: a value is no plain one."""
    return distribution.is_listed and any(isinstance(value, dict | list) for value in distribution.values)


def scheduler_of(config: RunConfig) -> TrialScheduler:
    """Ray Tune's form of the run file's scheduler; metric and mode are those of the search."""
    scheduler, max_t = config.search.scheduler, config.max_reports
    match scheduler:
        case AshaScheduler():
            return ASHAScheduler(
                max_t=max_t, grace_period=scheduler.grace_reports, reduction_factor=scheduler.reduction_factor
            )
        case MedianScheduler():
            return MedianStoppingRule(
                time_attr="training_iteration",
                grace_period=scheduler.grace_reports,
                min_samples_required=scheduler.min_trials,
            )
        case HyperbandScheduler():
            return HyperBandScheduler(max_t=max_t, reduction_factor=scheduler.reduction_factor)
        case PbtScheduler():
            names = scheduler.mutate or mutable_params(config)
            return PopulationBasedTraining(
                time_attr="training_iteration",
                perturbation_interval=scheduler.interval_reports,
                quantile_fraction=scheduler.quantile,
                resample_probability=scheduler.resample,
                hyperparam_mutations={name: mutation(config.search.one_space[name]) for name in names},
                custom_explore_fn=partial(within, bounds_of(config.search.one_space)),
                log_config=False,
            )
        case _:
            return FIFOScheduler()


def bounds_of(space: Mapping[str, Distribution]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of each searched range; listed values have none."""
    found: dict[str, tuple[float, float]] = {}
    for name, distribution in space.items():
        if distribution.randint is not None:
            low, high = distribution.randint
            found[name] = low, high - 1
        elif not distribution.is_listed:
            bounds = distribution.uniform or distribution.loguniform
            assert bounds is not None
            found[name] = bounds
    return found


def mutation(distribution: Distribution) -> Any:
    """What population based training draws from and nudges within: a list is stepped along, a range is scaled."""
    return list(distribution.values) if distribution.is_listed else domain(distribution)


def domain(distribution: Distribution) -> Any:
    """Ray Tune's form of a distribution of the run file."""
    values = distribution.values
    match distribution.kind:
        case "choice":
            return tune.choice([_domains_in(value) for value in values])
        case "grid":
            return tune.grid_search(list(values))
        case "uniform":
            return tune.uniform(*values)
        case "loguniform":
            return tune.loguniform(*values)
        case _:
            return tune.randint(*values)


def _domains_in(value: Any) -> Any:
    """A listed value with the distributions in it in Ray Tune's form, which draws them with it."""
    found = as_distribution(value)
    if found is not None:
        return domain(found)
    if isinstance(value, dict):
        return {name: _domains_in(part) for name, part in value.items()}
    return [_domains_in(part) for part in value] if isinstance(value, list | tuple) else value
