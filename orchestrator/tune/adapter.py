"""The trial as Ray Tune sees it: a light stand-in that leases a slot, forwards results and passes on the stop.

It trains nothing, imports no torch. One Tune actor serves many trials in turn (`reuse_actors`). Only public Tune API:
`Trainable`, `Callback`, `Stopper`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from orchestrator.control.controller import Answer
from orchestrator.control.lifecycle import TrialState
from policies.plan import TrialId

_RETRY_S = 0.25
_AWAY_LIMIT_S = 60.0


def trial_id_of(tune_trial_id: str) -> TrialId:
    """Our name of a Tune trial: its number in the search, which is the same when the search is started again."""
    return TrialId(f"trial-{tune_trial_id.rsplit('_', 1)[-1]}")


class SlotTrial(tune.Trainable):  # type: ignore[misc]
    """One trial of the search. `step` returns the next report of the trial that runs in a slot."""

    _id: TrialId
    _params: dict[str, Any]
    _index: int
    _is_submitted: bool
    _last: dict[str, Any]

    def setup(self, config: dict[str, Any], actor: str = "", namespace: str = "") -> None:
        """Take over a trial's configuration; nothing is started yet."""
        self._name, self._namespace = actor, namespace
        self._handle: Any = None
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """The next report.

        Raises:
            RuntimeError: the trial failed; the message is its reason.
        """
        if not self._is_submitted:
            self._ask("submit", self._id, self._params)
            self._is_submitted = True
        answer: Answer | None = None
        while answer is None:
            answer = self._ask("answer", self._id, self._index)
        self._index += 1
        if answer.report is None:
            if answer.state is TrialState.FAILED:
                raise RuntimeError(answer.reason)
            return {**self._last, "done": True}
        report = answer.report
        self._last = {**report.metrics, "num_samples": report.num_samples, "step": report.step}
        return {**self._last, "done": answer.is_last}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same actor serves the next trial."""
        self._stop()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """The actor is of no further use."""
        self._stop()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: commits and reports are in the run directory and in the journal."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see `save_checkpoint`."""

    def _begin(self, config: dict[str, Any]) -> None:
        self._id = trial_id_of(self.trial_id)
        self._params = dict(config)
        self._index, self._is_submitted, self._last = 0, False, {}

    def _stop(self) -> None:
        if self._is_submitted:
            self._is_submitted = False
            self._ask("release", self._id)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the policy actor until it answers; it may be restarting."""
        deadline_s = time.monotonic() + _AWAY_LIMIT_S
        while True:
            try:
                if self._handle is None:
                    self._handle = ray.get_actor(self._name, namespace=self._namespace)
                return ray.get(getattr(self._handle, method).remote(*arguments))
            except (RayError, ValueError):
                self._handle = None
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(_RETRY_S)


class StopForwarder(tune.Callback):  # type: ignore[misc]
    """Tells the policy actor at once that the scheduler stopped a trial.

    With reused actors Tune calls neither `stop` nor `cleanup` on an early stop; the stand-in would learn of it only
    when it is given its next trial.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended, by itself or by the scheduler; stopping one that ended by itself changes nothing."""
        self._handle.release.remote(trial_id_of(trial.trial_id))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        self._handle.release.remote(trial_id_of(trial.trial_id))


class Interrupter(tune.Stopper):  # type: ignore[misc]
    """Ends the search when the driver says so."""

    def __init__(self, is_interrupted: threading.Event) -> None:
        self._is_interrupted = is_interrupted

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its whole configuration; an event belongs to its process."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._is_interrupted = threading.Event()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole search ends."""
        return self._is_interrupted.is_set()
