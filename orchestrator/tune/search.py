"""The Ray Tune search of a run: its space, its scheduler, and `fit()` in a thread of its own.

The search allocates nothing: its stand-ins reserve a sliver of the head node, and slots hold the compute.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from orchestrator.config.model import AshaScheduler, Distribution, RunConfig
from orchestrator.tune.adapter import Interrupter, SlotTrial, StopForwarder

logger = logging.getLogger(__name__)

_HEAD_SLIVER = {"node:__internal_head__": 0.001}


class Search:
    """One search; `start` returns at once, `is_over` says when it has ended."""

    def __init__(self, config: RunConfig, metric: str, mode: str, storage_path: str) -> None:
        self._config, self._metric, self._mode, self._storage_path = config, metric, mode, storage_path
        self._is_interrupted = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: str | None = None

    def start(self, policy: Any, actor_name: str, namespace: str) -> None:
        """Begin the search with the policy actor of that name."""
        tuner = self._tuner(policy, actor_name, namespace)
        self._thread = threading.Thread(target=self._fit, args=(tuner,), name="search", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """End the search soon; its trials are not marked as finished by us."""
        self._is_interrupted.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the search; whether it came."""
        assert self._thread is not None
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _fit(self, tuner: tune.Tuner) -> None:
        try:
            tuner.fit()
        except Exception as error:
            logger.exception("the search failed")
            self.error = f"{type(error).__name__}: {error}"

    def _tuner(self, policy: Any, actor_name: str, namespace: str) -> tune.Tuner:
        search = self._config.search
        trainable = tune.with_parameters(SlotTrial, actor=actor_name, namespace=namespace)
        return tune.Tuner(
            tune.with_resources(trainable, _HEAD_SLIVER),
            param_space={name: domain(distribution) for name, distribution in search.space.items()},
            tune_config=tune.TuneConfig(
                num_samples=math.ceil(search.num_trials / search.grid_points),
                scheduler=self._scheduler(),
                search_alg=BasicVariantGenerator(random_state=self._config.seed, max_concurrent=search.num_slots),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=self._storage_path,
                callbacks=[StopForwarder(policy)],
                stop=Interrupter(self._is_interrupted),
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )

    def _scheduler(self) -> TrialScheduler:
        scheduler = self._config.search.scheduler
        if isinstance(scheduler, AshaScheduler):
            return ASHAScheduler(
                metric=self._metric,
                mode=self._mode,
                max_t=self._config.trial.max_reports,
                grace_period=scheduler.grace_reports,
                reduction_factor=scheduler.reduction_factor,
            )
        return FIFOScheduler()


def domain(distribution: Distribution) -> Any:
    """Ray Tune's form of a distribution of the run file."""
    values = distribution.values
    match distribution.kind:
        case "choice":
            return tune.choice(list(values))
        case "grid":
            return tune.grid_search(list(values))
        case "uniform":
            return tune.uniform(*values)
        case "loguniform":
            return tune.loguniform(*values)
        case _:
            return tune.randint(*values)
