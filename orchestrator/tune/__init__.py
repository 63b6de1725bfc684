"""Ray Tune: the search of a run, the stand-ins of its trials, and `trainable` for a search of your own.

with orchestrator.tune.trainable(train, metric="loss", mode="min") as trainable:  # or a run file
    tune.Tuner(trainable, param_space={"lr": tune.loguniform(1e-3, 1e-1)}, ...).fit()
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import Training

__all__ = ["trainable"]


def trainable(
    training: Training,
    overrides: Iterable[str] = (),
    *,
    resume: bool = False,
    trust_storage: bool = False,
    name: str | None = None,
    **options: Any,
) -> AbstractContextManager[type]:
    """A trainable for a `ray.tune.Tuner` of your own, whose trials run in slots under one policy.

    Opens the control plane (Ray, unless this process is connected already; the policy actor; the slots), and closes it
    when the `with` block ends. Of the `search` only `metric`, `mode` and `max_concurrent` are looked at, the number of
    slots; how many trials run at a time follows from it, so leave `max_concurrent_trials` alone. A declared training
    reports every `trial.samples_per_report` samples and is done after `trial.max_reports`; the keys of `param_space`
    are parameters of the training.

    Args:
        training: a run file, or what `orchestrator.run` takes: a function or class, its import path, or a dict.
        overrides: `a.b=value`, as on the command line.
        resume: take up a run of that name that is there, for `Tuner.restore`.
        trust_storage: go on with a run also where others can write its directory.
        name: of the run, where `training` is no run file.
        options: as those of `orchestrator.run`.

    Raises:
        ConfigError: something is wrong, the run exists (or, with `resume`, does not), or another process holds it.
        UnfitEnvironmentError: this is a Ray that was not tested, or the cluster has no room for one trial.
        WorkerGroupError: no slot could be opened.
    """
    from orchestrator.tune.session import open_session  # Ray takes seconds to import

    return open_session(
        training, list(overrides), is_resumed=resume, trusts_storage=trust_storage, name=name, options=options
    )
