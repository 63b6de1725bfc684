"""A search of the user's own: the control plane around a `Tuner` that somebody else builds and runs.

What `orchestrator run` is for the command line. Knows nothing of the search: what Tune's stand-ins ask for is all it
hears of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import RayError

from orchestrator.api import run_file_of
from orchestrator.beginning import (
    load_begun,
    make_run_dir,
    require_history,
    require_policy,
    with_counted_epochs,
    within_quota,
)
from orchestrator.cluster import RayCluster, cluster_leaks
from orchestrator.config import ResolvedRun, load_config, require_fit
from orchestrator.control_plane import ControlPlane
from orchestrator.driver import log_end, single_driver
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.host import require_linux
from orchestrator.interrupts import EXIT_CODES, reinstall, terminable
from orchestrator.run_dirs import StopKind, stop_request
from orchestrator.storage_trust import require_trusted
from orchestrator.tune.adapter import SlotTrial
from orchestrator.tune.admission import HEAD, require_tested_ray, sliver

if TYPE_CHECKING:
    from orchestrator.api import Training

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


@contextlib.contextmanager
def open_session(
    training: Training,
    overrides: list[str],
    *,
    is_resumed: bool,
    trusts_storage: bool,
    name: str | None,
    options: dict[str, Any],
) -> Iterator[type]:
    """See `orchestrator.tune.trainable`."""
    require_linux()
    require_tested_ray()
    with run_file_of(training, name=name, **options) as (file, settings):
        resolved = load_config(file, [*settings, *overrides], has_own_search=True)
        resolved = resolved if is_resumed else with_counted_epochs(resolved)
        run_dir = _run_dir(resolved, is_resumed=is_resumed, trusts_storage=trusts_storage)
    if is_resumed:
        resolved = load_begun(run_dir)
    resolved = within_quota(resolved)
    plane, stopping = ControlPlane(resolved, run_dir, is_foreign=True), Stopping(run_dir)
    with single_driver(run_dir), _connected(resolved, plane.namespace, run_dir):
        before = cluster_leaks(0.0)
        state = "failed"
        try:
            part = sliver(resolved.config.search.num_slots, ray.available_resources().get(HEAD, 0.0))
            plane.open()
            ray.get(plane.policy.set_state.remote("running"))
            address = plane.address
            with _watched(plane, stopping):
                yield tune.with_resources(
                    tune.with_parameters(SlotTrial, actor=address[0], namespace=address[1], is_foreign=True),
                    {HEAD: part},
                )
                while stopping.kind is None and plane.has_asked_for_trials():
                    time.sleep(_LOOK_S)
            state = _end_search(plane, stopping.kind)
        except BaseException:
            with contextlib.suppress(RayError):
                _end_search(plane)
            state = "interrupted"
            raise
        finally:
            plane.close(state, is_hurried=stopping.kind is StopKind.NOW)
            left = cluster_leaks()
            log_end(run_dir, state, {name: max(0, count - before[name]) for name, count in left.items()})


def _run_dir(resolved: ResolvedRun, *, is_resumed: bool, trusts_storage: bool) -> Path:
    """The run's directory, made if the run is new.

    Raises:
        ConfigError: it is there and must not be, or the other way round.
    """
    run_dir = resolved.run_dir
    require_fit(resolved, is_new=not is_resumed)
    require_policy(resolved)
    if is_resumed:
        if not (run_dir / "run.yaml").exists():
            raise ConfigError(f"{run_dir} holds no run.yaml; leave resume=True out to begin a new run")
        require_trusted(run_dir, is_trusted=trusts_storage)
        require_history(run_dir)
        (run_dir / "control" / "stop").unlink(missing_ok=True)
        return run_dir
    make_run_dir(resolved)
    return run_dir


@contextlib.contextmanager
def _connected(resolved: ResolvedRun, namespace: str, run_dir: Path) -> Iterator[None]:
    """The cluster of the run file, or the one this process is connected to already, which then stays connected."""
    if ray.is_initialized():
        yield
        return
    uses_gpus = resolved.config.devices.use != "cpu"
    cluster = resolved.config.cluster
    with (
        terminable(_terminated),
        RayCluster(cluster, namespace, run_dir, is_quiet=False, uses_gpus=uses_gpus).opened(),
    ):
        reinstall()
        yield


def _terminated() -> BaseException:
    return SystemExit(EXIT_CODES[signal.SIGTERM])


class Stopping:
    """The end that `orchestrator stop` asks for, and the way it reaches a search that is somebody else's.

    Tune ends a search with its state saved and its trials unfinished when it gets SIGINT or SIGUSR1, and listens to
    both while `fit()` runs in the main thread. SIGUSR1 means nothing to anybody else, so the user's own code goes on
    behind `fit()`. A process that nobody has taught what it means would end by it, so only one that knows gets it.

    Attributes:
        kind: what was asked for, None so far.
    """

    def __init__(self, run_dir: Path, send: Callable[[], None] | None = None) -> None:
        self._run_dir, self._send = run_dir, send or (lambda: os.kill(os.getpid(), signal.SIGUSR1))
        self._told: object = None
        self.kind: StopKind | None = None

    def look(self) -> None:
        """Look whether the end was asked for, and pass it on to each search once; called from time to time."""
        asked = stop_request(self._run_dir)
        if asked is None:
            return
        if self.kind is None:
            logger.warning("a stop was asked for: the search ends, and its trials write a checkpoint and leave")
        self.kind = asked
        listener = signal.getsignal(signal.SIGUSR1)
        # Each `fit()` brings a handler of its own.
        if callable(listener) and listener is not self._told:
            self._told = listener
            self._send()


@contextlib.contextmanager
def _watched(plane: ControlPlane, stopping: Stopping) -> Iterator[None]:
    """Pass on a stop, and fail the search when no slot opens: the actor is told, and every waiting stand-in hears it.

    Raises:
        OrchestratorError: that has happened.
    """
    is_over = threading.Event()
    problems: list[OrchestratorError] = []

    def look() -> None:
        while not is_over.wait(_LOOK_S):
            stopping.look()
            try:
                plane.require_slots()
            except OrchestratorError as problem:
                problems.append(problem)
                plane.policy.give_up.remote(str(problem))
                return

    watcher = threading.Thread(target=look, name="slots", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
    if problems:
        raise problems[0]


def _end_search(plane: ControlPlane, stop: StopKind | None = None) -> str:
    """How the search ended: cut off when trials still run or it was told to stop; trials then commit and leave.

    A trial of which no further report was asked for is not cut off: the search has stopped it, and Tune ended its
    stand-in without a word (it kills those that take long to end).
    """
    if stop is StopKind.NOW:
        return "interrupted"
    if stop is StopKind.GRACEFUL:
        plane.interrupt(lambda: False)
        return "interrupted"
    trials = ray.get(plane.policy.status.remote(), timeout=30.0)["trials"]
    unfinished = [trial for trial in trials if trial["state"] in {"running", "queued"}]
    if any(trial["is_report_wanted"] for trial in unfinished):
        plane.interrupt(lambda: False)
        return "interrupted"
    if unfinished:
        plane.put_aside([trial["trial_id"] for trial in unfinished])
        return "done"
    return "done" if any(trial["state"] in {"done", "stopped", "paused"} for trial in trials) else "failed"
