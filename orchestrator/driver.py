"""The driver of a run: starts Ray, the policy actor, the slots and the search, shows what happens, and cleans up.

Called by the command line. Holds no decision and no trial; when it ends, nothing of the run is left but its directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from orchestrator import evidence, room
from orchestrator.beginning import (
    load_begun,
    make_run_dir,
    require_history,
    require_policy,
    with_counted_epochs,
    within_quota,
)
from orchestrator.clock import SystemClock
from orchestrator.cluster import RayCluster, StartGivenUpError, cluster_leaks
from orchestrator.config import ResolvedRun, require_fit
from orchestrator.control.events import RunEnded
from orchestrator.control.journal import FILE_NAME as JOURNAL_NAME
from orchestrator.control.journal import Journal, segments
from orchestrator.control.status import FILE_NAME as STATUS_NAME
from orchestrator.control_plane import ControlPlane
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, EXIT_SOME_FAILED, ConfigError, JournalError, OrchestratorError
from orchestrator.interrupts import ENDING_S, Interrupts, LastResort, reinstall
from orchestrator.leftovers import remove_home, sweep
from orchestrator.output import LOG_NAME, lasting_output, say, say_last
from orchestrator.processes import Owner
from orchestrator.room import has_room
from orchestrator.run_dirs import (
    BEGUN_FILE,
    RUN_FILE,
    StopKind,
    mark_ended,
    stop_request,
)
from orchestrator.storage_trust import require_trusted
from orchestrator.view.failures import common_error
from orchestrator.view.report import failure_line, render_broken_off
from orchestrator.view.report import render as render_report
from orchestrator.view.terminal import LiveView, read_status
from orchestrator.view.text import dicts

if TYPE_CHECKING:
    from orchestrator.tune.search import Search

logger = logging.getLogger(__name__)

_GRACE_S = 60.0
_POLL_S = 0.2
_LEAVE_S = 30.0
_LEAST_ROOM_BYTES = 1 << 20
"""What a run needs at least before it begins."""
_NOTHING = {"actors": 0, "placement_groups": 0, "processes": 0}
_ENDED_WELL = frozenset({"done", "stopped", "paused"})


def start(resolved: ResolvedRun, *, plain: bool | None = None, is_quiet: bool = False) -> int:
    """Run a search from its beginning; returns the exit code.

    Args:
        resolved: the run file.
        plain: lines instead of a table; None decides by the terminal.
        is_quiet: print nothing but the run directory at the end.

    Raises:
        ConfigError: the run does not fit this machine, or its directory exists.
        UnfitEnvironmentError: Ray does not start.
    """
    require_fit(resolved)
    require_policy(resolved)
    resolved = with_counted_epochs(resolved)
    make_run_dir(resolved)
    return _drive(resolved, resolved.run_dir, plain=plain, is_quiet=is_quiet)


def _drive(
    resolved: ResolvedRun, run_dir: Path, *, plain: bool | None, is_quiet: bool = False, retries_all: bool = False
) -> int:
    """One start of a run, with output that lasts and signals that are taken from the first moment on."""
    driver = _Driver(resolved, run_dir, retries_all=retries_all)
    with driver.interrupts.taken(), lasting_output(run_dir / LOG_NAME, is_quiet=is_quiet) as screen:
        try:
            code = driver.execute(plain)
            if is_quiet:
                screen.write(f"{run_dir}\n")
        except OrchestratorError as error:  # said here, where output lasts
            say_last(f"error: {error}")
            code = error.exit_code
        except Exception:
            logger.exception("the run ended with an unexpected error; please report it with the lines below")
            code = EXIT_FAILED
    if driver.is_stuck:  # a thread of Ray waits for what is gone; the interpreter would wait for the thread
        driver.leave(code)
    return code


def resume(run_dir: Path, *, plain: bool | None = None, retries_all: bool = False, trusts_storage: bool = False) -> int:
    """Take up an interrupted run where its journal left it; returns the exit code.

    Trials that failed for reasons outside of them are tried again, with `retries_all` every one that failed.

    Raises:
        ConfigError: there is nothing to resume, or others can have written what is there (unless `trusts_storage`).
    """
    status = read_status(run_dir / STATUS_NAME)
    if not (run_dir / RUN_FILE).exists() and not run_dir.joinpath(*BEGUN_FILE).exists():
        raise ConfigError(f"{run_dir} holds no run.yaml and is no run directory; see: orchestrator list")
    if status is not None and status.get("state") == "done":
        require_retries(status, run_dir, retries_all=retries_all)
    require_trusted(run_dir, is_trusted=trusts_storage)
    require_history(run_dir)
    resolved = load_begun(run_dir)
    require_fit(resolved, is_new=False)
    require_policy(resolved)
    (run_dir / "control" / "stop").unlink(missing_ok=True)
    return _drive(resolved, run_dir, plain=plain, retries_all=retries_all)


def require_retries(status: Mapping[str, Any], run_dir: Path, *, retries_all: bool) -> None:
    """Refuse to go on with a run that is done and has no trial to try again.

    Raises:
        ConfigError: it has none.
    """
    failed = [trial for trial in dicts(status.get("trials")) if trial.get("state") == "failed"]
    if any(retries_all or trial.get("cause") for trial in failed):
        return
    hint = f"; of its trials {len(failed)} failed by themselves: `--retry-failed` tries them again" if failed else ""
    raise ConfigError(f"the run in {run_dir} is done; nothing to resume{hint}")


def _load_torch() -> None:
    """Ray Train wants it in this process before it opens a slot; it takes seconds, in which Ray starts."""
    import torch  # noqa: F401


def _state_of(run_dir: Path) -> str:
    """The state that the actor wrote last."""
    return str((read_status(run_dir / STATUS_NAME) or {}).get("state", ""))


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


_ALIKE = 2
"""Trials that fail alike, at least, before the others are not tried any more."""
_LOOK_AT_FAILURES_S = 0.5


class _Driver:
    """One start of a run.

    Attributes:
        interrupts: the signals it was sent.
        is_stuck: whether Ray had to be ended the hard way.
    """

    def __init__(self, resolved: ResolvedRun, run_dir: Path, *, retries_all: bool = False) -> None:
        resolved = within_quota(resolved)
        self._resolved, self._run_dir = resolved, run_dir
        self._config = resolved.config
        self._plane = ControlPlane(resolved, run_dir, retries_all=retries_all)
        uses_gpus = self._config.devices.use != "cpu"
        self._ray = RayCluster(self._config.cluster, self._plane.namespace, run_dir, uses_gpus=uses_gpus)
        self.interrupts, self.is_stuck = Interrupts(), False
        self._plane.is_cancelled = lambda: bool(self.interrupts.number)
        self._last_resort = LastResort(self.interrupts, self._end_hard, self.leave)
        self._view: LiveView | None = None
        self._thaw: Callable[[], None] = lambda: None
        self._looked_s = 0.0
        self._has_ended, self._is_reported = threading.Lock(), threading.Lock()

    def execute(self, plain: bool | None) -> int:
        """The whole life of the run; returns the exit code.

        Raises:
            OrchestratorError: it could not go on; the journal says that it failed.
        """
        loading = threading.Thread(target=_load_torch, name="torch", daemon=True)
        loading.start()
        self._view = LiveView(lambda: read_status(self._run_dir / STATUS_NAME), plain=plain)
        if not room.wait(self._run_dir, _LEAST_ROOM_BYTES, _say_waiting, lambda: self._wish_to_stop() is not None):
            return self._last_word("interrupted", dict(_NOTHING))
        with single_driver(self._run_dir), self._last_resort:
            for leftover in sweep():
                say(f"removed {leftover}, whose driver is dead")
            try:
                state, leaks = self._live(loading, self._view)
            except StartGivenUpError:
                state, leaks = "interrupted", dict(_NOTHING)
            except OrchestratorError:
                if self._wish_to_stop() is None:
                    self._last_word("failed", dict(_NOTHING))
                    raise
                state, leaks = "interrupted", dict(_NOTHING)
            return self._last_word(state, leaks)

    def _live(self, loading: threading.Thread, view: LiveView) -> tuple[str, dict[str, int]]:
        """Everything between the start of Ray and its end; how the run ended, and what is left in the cluster."""
        with self._ray.opened(lambda: self._wish_to_stop() is not None):
            reinstall()
            while loading.is_alive():  # two threads must not load it at once
                loading.join(_POLL_S)
                self._require_wanted()
            view.start()
            try:
                state = self._search()
            finally:
                view.stop()
            if state == _state_of(self._run_dir):  # what there is to say need not wait for the end of Ray
                self._report()
            # Nothing is in an own cluster whose processes are ended.
            return state, dict(_NOTHING) if self._ray.is_abandoned else cluster_leaks()

    def _last_word(self, state: str, leaks: dict[str, int]) -> int:
        """Write down and say how the run ended; returns the exit code."""
        if self._has_ended.acquire(blocking=False):  # the last resort may come at the same moment
            self.is_stuck = self._ray.is_stuck
            leaks["processes"] = self._ray.num_left
            self._log_end(state, leaks)
            mark_ended(self._run_dir, state)
            self._report()
            line = failure_line(read_status(self._run_dir / STATUS_NAME) or {}) if state == "done" else None
            if line is not None:
                say_last(line)
                return EXIT_SOME_FAILED
        return {"done": EXIT_DONE, "interrupted": self.interrupts.exit_code}.get(state, EXIT_FAILED)

    def _log_end(self, state: str, leaks: dict[str, int]) -> None:
        """The last entry of the journal, once there is room for it."""
        is_said = False
        while True:
            try:
                log_end(self._run_dir, state, leaks)
            except (JournalError, OSError) as error:
                if has_room(self._run_dir):
                    raise
                if not is_said:
                    say_last(f"the last entry of the journal waits: {error}")
                is_said = True
                if self.interrupts.number:
                    return
                time.sleep(_POLL_S)
            else:
                return

    def _report(self) -> None:
        """Say what came of the run, once; its last line is the run directory."""
        if self._is_reported.acquire(blocking=False):
            status, width = read_status(self._run_dir / STATUS_NAME), shutil.get_terminal_size().columns
            is_broken_off = status is None
            say(
                render_broken_off(self._run_dir)
                if is_broken_off
                else render_report(status or {}, self._run_dir, width=width)
            )

    def _end_hard(self) -> int:
        """The last resort: end every process of the run, and say that it was interrupted."""
        logger.warning("the run has not ended in time; what is left of it is ended now")
        if self._view is not None:
            self._view.stop()
        if self._ray.home is not None:
            remove_home(self._ray.home)
        elif self._plane.policy is not None:
            killing = threading.Thread(target=self._plane.end_actor, daemon=True)
            killing.start()
            killing.join(2.0)
        self._thaw()  # nobody writes the search's state any more
        code = self._last_word("interrupted", dict(_NOTHING))
        say_last(f"the run in {self._run_dir} did not end in time and was ended")
        return code

    def leave(self, code: int) -> None:
        """End this process without what Ray would do at its end; nothing that its thread wrote meanwhile stays."""
        if self._ray.home is not None:
            remove_home(self._ray.home)
        os._exit(code)

    def _search(self) -> str:
        """Everything that needs the cluster; returns how the run ended."""
        plane, state = self._plane, "failed"
        try:
            plane.open()
            state = self._follow(plane)
        except RayError as error:
            self._ray.require()
            raise OrchestratorError(f"Ray does not answer: {type(error).__name__}: {error}") from error
        finally:
            if self.interrupts.number:
                self._last_resort.allow(ENDING_S)
            if not (self._ray.is_there and plane.close(state, is_hurried=bool(self.interrupts.number))):
                self._ray.abandon()
        return state

    def _follow(self, plane: ControlPlane) -> str:
        """Start the search and wait for its end, a signal, or a request to stop."""
        from orchestrator.tune.search import Search

        if self._wish_to_stop() is not None:
            return "interrupted"
        search = Search(self._config, plane.spec.metric, plane.spec.mode, str(self._run_dir))
        search.start(plane.policy, *plane.address)
        ray.get(plane.policy.set_state.remote("running"))
        while not self._is_over(search, plane):
            try:
                self._ray.require()
                plane.require_slots()
            except OrchestratorError:
                search.interrupt()
                raise
            if self._fails_alike():
                say("every trial failed in the same way: the search ends early")
                search.interrupt()
                search.join(_GRACE_S)
                return "failed"
            wish = self._wish_to_stop()
            if wish is StopKind.NOW:
                return "interrupted"
            if wish is StopKind.GRACEFUL:
                say("interrupted: trials write a checkpoint and leave; once more to stop at once")
                self._last_resort.allow(_GRACE_S + ENDING_S)
                search.freeze()
                self._thaw = search.thaw
                plane.interrupt(lambda: self._wish_to_stop() is StopKind.NOW)
                self._last_resort.allow(ENDING_S)
                search.interrupt()
                search.join(_GRACE_S)
                search.thaw()
                self._thaw = lambda: None
                return "interrupted"
        if search.error is not None:
            logger.error("the search failed: %s", search.error)
            return "failed"
        return "done" if _ENDED_WELL.intersection(_last_states(plane)) else "failed"

    def _is_over(self, search: Search, plane: ControlPlane) -> bool:
        """Whether the search has ended, and so have trials that were added beside it; waits a moment where not."""
        if not search.join(_POLL_S):
            return False
        if not plane.has_asked_for_trials():
            return True
        time.sleep(_POLL_S)
        return False

    def _fails_alike(self) -> bool:
        """Whether all trials so far failed with one error, and there are more than fit side by side."""
        now_s = time.monotonic()
        if now_s < self._looked_s + _LOOK_AT_FAILURES_S:
            return False
        self._looked_s = now_s
        num_alike = max(_ALIKE, self._config.search.num_slots)
        return common_error(read_status(self._run_dir / STATUS_NAME) or {}, num_alike) is not None

    def _wish_to_stop(self) -> StopKind | None:
        """Whether a signal or another process asked for the end."""
        if self.interrupts.number:
            return StopKind.NOW if self.interrupts.number > 1 else StopKind.GRACEFUL
        return stop_request(self._run_dir)

    def _require_wanted(self) -> None:
        if self._wish_to_stop() is not None:
            raise StartGivenUpError


def _say_waiting(text: str) -> None:
    say_last(f"the run waits: {text}")


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
        lock.write(Owner.this().record())
        lock.flush()
        evidence.forget(run_dir)
        yield


def log_end(run_dir: Path, state: str, leaks: dict[str, int]) -> None:
    """Write the driver's last word into the journal of a run that has begun."""
    if not any(path.exists() for path in segments(run_dir)):
        return
    journal, clock = Journal(run_dir / JOURNAL_NAME), SystemClock()
    try:
        journal.append([RunEnded(t_s=clock.now_s(), wall_s=clock.wall_s(), state=state, leaks=leaks)])
        journal.sync()
    finally:
        journal.abandon()
    evidence.record_or_not(run_dir)
