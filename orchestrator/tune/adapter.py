"""The trial as Ray Tune sees it: a light stand-in that leases a slot, forwards results and passes on the stop.

It trains nothing, imports no torch. One Tune actor may serve many trials in turn (`reuse_actors`). Only public Tune
API: `Trainable`, `Callback`, `Stopper`.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from orchestrator.control.controller import Answer
from orchestrator.control.orders import Resumption
from orchestrator.control.world import TrialState
from orchestrator.errors import JournalError
from orchestrator.policies.plan import TrialId
from orchestrator.policy_handle import policy_at
from orchestrator.tune.admission import require_untouched

WHOLE = "parameters"
"""Under this name Tune's configuration of a trial holds all parameters, where they are drawn as a whole."""

_RETRY_S = 0.25
_AWAY_LIMIT_S = 60.0


def trial_id_of(tune_trial_id: str, *, is_foreign: bool = False) -> TrialId:
    """Our name of a Tune trial.

    In a search of ours its number, which is the same when the search is started again. In one of the user's own, of
    which a run may see several, all of Tune's name, which `Tuner.restore` keeps.
    """
    return TrialId(f"trial-{tune_trial_id.replace('_', '-') if is_foreign else tune_trial_id.rsplit('_', 1)[-1]}")


def within(bounds: Mapping[str, tuple[float, float]], params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with those outside of their range at its nearer end.

    Ray Tune scales a parameter up and down without regard to the range it was drawn from, and a range that is sampled
    by its logarithm can be left by a rounding error.
    """
    return params | {name: min(max(params[name], low), high) for name, (low, high) in bounds.items() if name in params}


class TrialFailedError(RuntimeError):
    """The trial behind a stand-in failed; Tune is told so in this way, and knows nothing of the reason but its text."""


class SlotTrial(tune.Trainable):  # type: ignore[misc]
    """One trial of the search. `step` returns the next report of the trial that runs in a slot.

    What Tune keeps as its checkpoint is a pointer: the commit behind a report, and the number of that report.
    """

    _id: TrialId
    _params: dict[str, Any]
    _index: int
    _is_submitted: bool
    _last: dict[str, Any]
    _pointer: dict[str, Any]

    def setup(
        self,
        config: dict[str, Any],
        actor: str = "",
        namespace: str = "",
        is_foreign: bool = False,
        worst: tuple[str, float] | None = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Take over a trial's configuration; nothing is started yet.

        `worst` is the name of the metric, and what the search is told where a trial has diverged and its metric is no
        number: Ray Tune's schedulers compare with it, and a comparison with NaN stops nobody.
        `bounds` are the ranges of the searched parameters, outside of which no searcher's value is taken.
        `is_foreign` says that the search is the user's own: it may take up trials again that it let stop or fail.

        Raises:
            ConfigError: a scheduler has changed the resources of the trial.
        """
        self._name, self._namespace, self._is_foreign = actor, namespace, is_foreign
        self._handle: Any = None
        self._worst, self._bounds = worst, bounds or {}
        require_untouched(self.trial_resources)
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """The next report.

        Raises:
            TrialFailedError: the trial failed; the message is its reason.
        """
        if not self._is_submitted:
            resumption = Resumption(token=uuid.uuid4().hex, reopens=self._is_foreign, **self._pointer)
            self._ask("submit", self._id, self._params, resumption)
            self._is_submitted = True
        answer: Answer | None = None
        while answer is None:
            answer = self._ask("answer", self._id, self._index)
        if answer.report is None:
            if answer.state is TrialState.FAILED:
                raise TrialFailedError(answer.reason)
            return {**self._last, "done": True}
        self._index += 1
        report = answer.report
        self._last = {**report.metrics, "num_samples": report.num_samples, "step": report.step}
        if self._worst is not None and not math.isfinite(self._last.get(self._worst[0], 0.0)):
            self._last[self._worst[0]] = self._worst[1]
        return {**self._last, "done": answer.is_last}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same actor serves the next trial."""
        self._put_aside()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """The actor is of no further use; whether its trial is, the search knows."""
        self._put_aside()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where the state behind the last report is; it is kept there from here on."""
        if not self._is_submitted:
            return self._pointer
        pointer: dict[str, Any] = self._ask("pin", self._id, self._index)
        return pointer

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on where a pointer leads: of this trial, or of the one whose state it takes up."""
        self._put_aside()
        self._pointer = dict(checkpoint)
        self._index = int(self._pointer.get("num_reports", 0))

    def _begin(self, config: dict[str, Any]) -> None:
        self._id = trial_id_of(self.trial_id, is_foreign=self._is_foreign)
        self._params = within(self._bounds, dict(config if self._is_foreign else config.get(WHOLE, config)))
        self._index, self._is_submitted, self._last, self._pointer = 0, False, {}, {}

    def _put_aside(self) -> None:
        if self._is_submitted:
            self._is_submitted = False
            self._ask("pause", self._id)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the policy actor until it answers; it may be restarting."""
        deadline_s = time.monotonic() + _AWAY_LIMIT_S
        while True:
            try:
                if self._handle is None:
                    self._handle = policy_at(self._name, self._namespace)
                return ray.get(getattr(self._handle, method).remote(*arguments))
            except (RayError, ValueError) as error:
                self._handle = None
                if isinstance(error, JournalError):  # it is there, and its disk is full: wait for room
                    deadline_s = time.monotonic() + _AWAY_LIMIT_S
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(_RETRY_S)


class _Live:
    """What belongs to this process: Tune pickles callbacks and stoppers, and gives them back in another start."""

    policy: Any = None
    is_interrupted = threading.Event()


LIVE = _Live()


class StopForwarder(tune.Callback):  # type: ignore[misc]
    """Tells the policy actor at once that the scheduler stopped a trial, so that it ends instead of being put aside.

    With reused actors Tune calls neither `stop` nor `cleanup` on an early stop; the stand-in would learn of it only
    when it is given its next trial.
    """

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended, by itself or by the scheduler; stopping one that ended by itself changes nothing."""
        LIVE.policy.release.remote(trial_id_of(trial.trial_id))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        LIVE.policy.release.remote(trial_id_of(trial.trial_id))


class Interrupter(tune.Stopper):  # type: ignore[misc]
    """Ends the search when the driver says so."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole search ends."""
        return LIVE.is_interrupted.is_set()
