"""Ray Tune: the search of a run, the stand-ins of its trials, and `trainable` for a search of your own.

with orchestrator.tune.trainable("run.yaml") as trainable:
    tune.Tuner(trainable, param_space={"lr": tune.loguniform(1e-3, 1e-1)}, ...).fit()
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

__all__ = ["trainable"]


def trainable(
    run_file: Path | str, overrides: Iterable[str] = (), *, resume: bool = False
) -> AbstractContextManager[type]:
    """A trainable for a `ray.tune.Tuner` of your own, whose trials run in slots under the policy of a run file.

    Opens the control plane (Ray, unless this process is connected already; the policy actor; the slots), and closes it
    when the `with` block ends. Of the run file's `search` only `max_concurrent` is looked at, the number of slots; how
    many trials run at a time follows from it, so leave `max_concurrent_trials` alone. A trial reports every
    `trial.samples_per_report` samples and is done after `trial.max_reports`; the keys of `param_space` are parameters
    of the job.

    Args:
        run_file: what trains, on which dials, under which policy.
        overrides: `a.b=value`, as on the command line.
        resume: take up a run of that name that is there, for `Tuner.restore`.

    Raises:
        ConfigError: the run file is wrong, its run exists (or, with `resume`, does not), or another process holds it.
        UnfitEnvironmentError: this is a Ray that was not tested, or the cluster has no room for one trial.
        WorkerGroupError: no slot could be opened.
    """
    from orchestrator.tune.session import open_session  # Ray takes seconds to import

    return open_session(Path(run_file), list(overrides), is_resumed=resume)
