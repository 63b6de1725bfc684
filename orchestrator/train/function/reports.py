"""Results and checkpoints that a function hands to Ray go to its attempt.

A slot is itself a Ray Train worker, whose `ray.train.report` would report on the slot. So the public functions are
replaced, in the slot's process and before the user's module is imported: while a function attempt runs they serve it,
otherwise they are Ray's own. `ray.train.get_context()` stays: a trial's ranks are those of its slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import ray.train
import ray.tune

from orchestrator.train.function.current import running


def install() -> None:
    """Replace them; harmless when called again."""
    if getattr(ray.train.report, "serves_attempts", False):
        return
    plain_train, plain_tune = ray.train.report, ray.tune.report

    @wraps(plain_train)
    def train_report(metrics: Mapping[str, Any], checkpoint: Any = None, *args: Any, **kwargs: Any) -> None:
        if not _taken(metrics, checkpoint):
            plain_train(metrics, checkpoint, *args, **kwargs)

    @wraps(plain_tune)
    def tune_report(metrics: Mapping[str, Any], *, checkpoint: Any = None) -> None:
        if not _taken(metrics, checkpoint):
            plain_tune(metrics, checkpoint=checkpoint)

    train_report.serves_attempts = True  # type: ignore[attr-defined]
    ray.train.report, ray.tune.report = train_report, tune_report
    ray.train.get_checkpoint = _checkpoint_getter(ray.train.get_checkpoint, ray.train.Checkpoint)
    ray.tune.get_checkpoint = _checkpoint_getter(ray.tune.get_checkpoint, ray.tune.Checkpoint)
    plain_context = ray.tune.get_context

    @wraps(plain_context)
    def get_context() -> Any:
        return plain_context() if running() is None else _Context()

    ray.tune.get_context = get_context


def _taken(metrics: Mapping[str, Any], checkpoint: Any) -> bool:
    """Hand a report to the running attempt; False where there is none."""
    attempt = running()
    if attempt is None:
        return False
    if checkpoint is None:
        attempt.report(metrics, None)
    else:
        with checkpoint.as_directory() as directory:
            attempt.report(metrics, Path(directory))
    return True


def _checkpoint_getter(plain: Any, kind: Any) -> Any:
    @wraps(plain)
    def get_checkpoint() -> Any:
        attempt = running()
        if attempt is None:
            return plain()
        path = attempt.checkpoint
        return None if path is None else kind.from_directory(str(path))

    return get_checkpoint


class _Context(ray.tune.TuneContext):  # type: ignore[misc]
    """What a Tune function asks of its trial."""

    def __init__(self) -> None:
        attempt = running()
        assert attempt is not None
        self._info = attempt.info

    def get_experiment_name(self) -> str:
        """The name of the run."""
        return self._info.run

    def get_trial_name(self) -> str:
        """The trial's id."""
        return self._info.trial_id

    def get_trial_id(self) -> str:
        """The trial's id."""
        return self._info.trial_id

    def get_trial_dir(self) -> str:
        """The trial's own directory."""
        return str(self._info.directory)

    def get_trial_resources(self) -> Any:
        """Nothing is reserved for one trial: its share changes while it runs."""
        return ray.tune.PlacementGroupFactory([{}])
