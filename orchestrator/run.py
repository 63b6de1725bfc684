"""The driver of a run: starts Ray, the policy actor, the slots and the search, shows what happens, and cleans up.

Called by the command line. Holds no decision and no trial; when it ends, nothing of the run is left but its directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from orchestrator.clock import SystemClock
from orchestrator.cluster import cluster_leaks, num_child_processes, ray_cluster
from orchestrator.config import ResolvedRun, load_config, require_fit
from orchestrator.config.render import scalar
from orchestrator.control.events import RunEnded
from orchestrator.control.journal import FILE_NAME as JOURNAL_NAME
from orchestrator.control.journal import Journal
from orchestrator.control.status import FILE_NAME as STATUS_NAME
from orchestrator.control_plane import ACTOR_NAME, ControlPlane
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.names import write_atomically
from orchestrator.run_dirs import StopKind, stop_request
from orchestrator.view.report import render as render_report
from orchestrator.view.terminal import LiveView, read_status

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_GRACE_S = 60.0
_POLL_S = 0.2
_LEAVE_S = 30.0


def start(resolved: ResolvedRun, *, plain: bool | None = None) -> int:
    """Run a search from its beginning; returns the exit code.

    Raises:
        ConfigError: the run does not fit this machine, or its directory exists.
        UnfitEnvironmentError: Ray does not start.
    """
    require_fit(resolved)
    make_run_dir(resolved)
    return _Driver(resolved, resolved.run_dir).execute(plain)


def make_run_dir(resolved: ResolvedRun) -> None:
    """The directory of a new run, with its run file.

    Raises:
        ConfigError: it cannot be made there.
    """
    run_dir = resolved.run_dir
    try:
        run_dir.mkdir(parents=True, mode=0o700)
        write_atomically(run_dir / "run.yaml", resolved.to_yaml(with_origins=True))
    except FileExistsError:
        raise ConfigError(f"{run_dir} exists already; allowed: another name, or `orchestrator resume`") from None
    except OSError as error:
        raise ConfigError(
            f"storage: {run_dir} cannot be made ({error.strerror}); allowed: a directory that you may write to"
        ) from None


def resume(run_dir: Path, *, plain: bool | None = None) -> int:
    """Take up an interrupted run where its journal left it; returns the exit code.

    Raises:
        ConfigError: there is nothing to resume.
    """
    status = read_status(run_dir / STATUS_NAME)
    if not (run_dir / "run.yaml").exists():
        raise ConfigError(f"{run_dir} holds no run.yaml and is no run directory; see: orchestrator list")
    if status is not None and status.get("state") == "done":
        raise ConfigError(f"the run in {run_dir} is done; nothing to resume")
    require_history(run_dir)
    place = [f"storage={scalar(str(run_dir.parent))}", f"name={scalar(run_dir.name)}"]
    resolved = load_config(run_dir / "run.yaml", place)
    require_fit(resolved, is_new=False)
    (run_dir / "control" / "stop").unlink(missing_ok=True)
    return _Driver(resolved, run_dir).execute(plain)


def require_history(run_dir: Path) -> None:
    """Refuse to begin a run from its start whose trials have run already.

    Raises:
        ConfigError: its journal is empty or gone.
    """
    journal = run_dir / JOURNAL_NAME
    if journal.exists() and journal.stat().st_size:
        return
    status = read_status(run_dir / STATUS_NAME) or {}
    if any(path.name != "warm-up" for path in run_dir.glob("trials/*")) or status.get("trials"):
        raise ConfigError(
            f"{journal} is empty or gone although trials ran: what they had done is not known;"
            " allowed: a run with its journal. Restore it, or begin a new run under another name"
        )


def _load_torch() -> None:
    """Ray Train wants it in this process before it opens a slot; it takes seconds, in which Ray starts."""
    import torch  # noqa: F401


def _last_states(plane: ControlPlane) -> list[str]:
    """The states of all trials once those whose end the search has seen have left their slots.

    Tune lets go of a trial at its last report, which is a moment before the slot says that it is done.
    """
    deadline_s = time.monotonic() + _LEAVE_S
    while True:
        states = [trial["state"] for trial in ray.get(plane.policy.status.remote())["trials"]]
        if "running" not in states or time.monotonic() > deadline_s:
            return states
        time.sleep(_POLL_S)


class _Driver:
    """One start of a run."""

    def __init__(self, resolved: ResolvedRun, run_dir: Path) -> None:
        self._resolved, self._run_dir = resolved, run_dir
        self._config = resolved.config
        self._plane = ControlPlane(resolved, run_dir)
        self._num_signals = 0

    def execute(self, plain: bool | None) -> int:
        """The whole life of the run.

        Raises:
            OrchestratorError: it could not go on; the journal says that it failed.
        """
        error: OrchestratorError | None = None
        loading = threading.Thread(target=_load_torch, name="torch", daemon=True)
        loading.start()
        view = LiveView(lambda: read_status(self._run_dir / STATUS_NAME), plain=plain)
        uses_gpus = self._config.devices.use != "cpu"
        with (
            self._signals(is_starting=True),
            single_driver(self._run_dir),
            ray_cluster(self._config.cluster, self._plane.namespace, uses_gpus=uses_gpus),
        ):
            loading.join()  # two threads must not load it at once
            with self._signals():
                view.start()
                try:
                    state = self._search()
                except OrchestratorError as problem:
                    state, error = "failed", problem
                finally:
                    view.stop()
            leaks = cluster_leaks()
        leaks["processes"] = num_child_processes()
        log_end(self._run_dir, state, leaks)
        status = read_status(self._run_dir / STATUS_NAME)
        if status is not None:
            _say(render_report(status, self._run_dir))
        if error is not None:
            raise error
        return {"done": EXIT_DONE, "interrupted": EXIT_INTERRUPTED}.get(state, EXIT_FAILED)

    def _search(self) -> str:
        """Everything that needs the cluster; returns how the run ended."""
        plane, state = self._plane, "failed"
        try:
            plane.open()
            state = self._follow(plane)
        finally:
            plane.close(state, is_hurried=self._num_signals >= 2)
        return state

    def _follow(self, plane: ControlPlane) -> str:
        """Start the search and wait for its end, a signal, or a request to stop."""
        from orchestrator.tune.search import Search

        search = Search(self._config, plane.spec.metric, plane.spec.mode, str(self._run_dir))
        search.start(plane.policy, ACTOR_NAME, plane.namespace)
        ray.get(plane.policy.set_state.remote("running"))
        while not search.join(_POLL_S):
            try:
                plane.require_slots()
            except OrchestratorError:
                search.interrupt()
                raise
            wish = self._wish_to_stop()
            if wish == "now":
                return "interrupted"
            if wish == "graceful":
                _say("interrupted: trials write a checkpoint and leave; once more to stop at once")
                search.freeze()
                plane.interrupt(lambda: self._num_signals >= 2)
                search.interrupt()
                search.join(_GRACE_S)
                search.thaw()
                return "interrupted"
        if search.error is not None:
            logger.error("the search failed: %s", search.error)
            return "failed"
        return "done" if any(state in {"done", "stopped", "paused"} for state in _last_states(plane)) else "failed"

    def _wish_to_stop(self) -> StopKind | None:
        """Whether a signal or another process asked for the end."""
        if self._num_signals:
            return StopKind.NOW if self._num_signals >= 2 else StopKind.GRACEFUL
        return stop_request(self._run_dir)

    @contextlib.contextmanager
    def _signals(self, *, is_starting: bool = False) -> Iterator[None]:
        """Count interrupts; around `ray.init`, which does not survive one, and behind it, since it installs its own."""

        def note(_number: int, _frame: object) -> None:
            self._num_signals += 1
            if is_starting:
                os.write(2, b"interrupted: the run ends as soon as Ray has started\n")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def single_driver(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process.

    Raises:
        ConfigError: another process holds it.
    """
    import fcntl

    (run_dir / "control").mkdir(exist_ok=True)  # empty directories get lost in some copies
    with (run_dir / "control" / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process runs {run_dir}; follow it with: orchestrator watch {run_dir}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def log_end(run_dir: Path, state: str, leaks: dict[str, int]) -> None:
    """Write the driver's last word into the journal."""
    journal, clock = Journal(run_dir / JOURNAL_NAME), SystemClock()
    journal.append([RunEnded(t_s=clock.now_s(), wall_s=clock.wall_s(), state=state, leaks=leaks)])
    journal.close()


def _say(text: str) -> None:
    """Print for people."""
    import sys

    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
