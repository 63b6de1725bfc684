"""The driver of a run: starts Ray, the policy actor, the slots and the search, shows what happens, and cleans up.

Called by the command line. Holds no decision and no trial; when it ends, nothing of the run is left but its directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from orchestrator.clock import SystemClock
from orchestrator.cluster import cluster_leaks, num_child_processes, ray_cluster
from orchestrator.config import ResolvedRun, load_config, require_fit
from orchestrator.config.render import scalar
from orchestrator.control.journal import FILE_NAME as JOURNAL_NAME
from orchestrator.control.journal import Journal
from orchestrator.control.orders import TrialOrder
from orchestrator.control.status import FILE_NAME as STATUS_NAME
from orchestrator.errors import ConfigError, OrchestratorError, UnfitEnvironmentError, WorkerGroupError
from orchestrator.names import write_atomically
from orchestrator.run_spec import middle_params, run_spec
from orchestrator.supervisor import SlotSpec, Supervisor
from orchestrator.view.report import render as render_report
from orchestrator.view.terminal import LiveView, read_status
from policies.plan import TrialId

if TYPE_CHECKING:
    from orchestrator.tune.search import Search

logger = logging.getLogger(__name__)

ACTOR_NAME = "policy"
EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_GRACE_S = 60.0
_CLOSE_TIMEOUT_S = 30.0
_POLL_S = 0.2


def start(resolved: ResolvedRun, *, plain: bool | None = None) -> int:
    """Run a search from its beginning; returns the exit code.

    Raises:
        ConfigError: the run does not fit this machine, or its directory exists.
        UnfitEnvironmentError: Ray does not start.
    """
    require_fit(resolved)
    run_dir = resolved.run_dir
    run_dir.mkdir(parents=True, mode=0o700)
    (run_dir / "control").mkdir()
    write_atomically(run_dir / "run.yaml", resolved.to_yaml(with_origins=True))
    return _Driver(resolved, run_dir).execute(plain)


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
    place = [f"storage={scalar(str(run_dir.parent))}", f"name={scalar(run_dir.name)}"]
    resolved = load_config(run_dir / "run.yaml", place)
    require_fit(resolved, is_new=False)
    (run_dir / "control" / "stop").unlink(missing_ok=True)
    return _Driver(resolved, run_dir).execute(plain)


class _Driver:
    """One start of a run."""

    def __init__(self, resolved: ResolvedRun, run_dir: Path) -> None:
        self._resolved, self._run_dir = resolved, run_dir
        self._config = resolved.config
        self._spec = run_spec(resolved)
        self._namespace = f"orchestrator-{self._config.name}-{uuid.uuid4().hex[:8]}"
        self._num_signals = 0

    def execute(self, plain: bool | None) -> int:
        """The whole life of the run.

        Raises:
            OrchestratorError: it could not go on; the journal says that it failed.
        """
        error: OrchestratorError | None = None
        view = LiveView(lambda: read_status(self._run_dir / STATUS_NAME), plain=plain)
        with _single_driver(self._run_dir), ray_cluster(self._config.cluster, self._namespace):
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
        journal = Journal(self._run_dir / JOURNAL_NAME)
        clock = SystemClock()
        journal.append("run_ended", clock.now_s(), clock.wall_s(), state=state, leaks=leaks)
        journal.close()
        status = read_status(self._run_dir / STATUS_NAME)
        if status is not None:
            _say(render_report(status, self._run_dir))
        if error is not None:
            raise error
        return {"done": EXIT_DONE, "interrupted": EXIT_INTERRUPTED}.get(state, EXIT_FAILED)

    def _search(self) -> str:
        """Everything that needs the cluster; returns how the run ended."""
        from orchestrator.control.actor import PolicyActor

        policy = (
            ray.remote(PolicyActor)
            .options(
                name=ACTOR_NAME,
                namespace=self._namespace,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=1000,
            )
            .remote(self._spec, self._namespace)
        )
        supervisor = Supervisor(self._slot_spec(), policy)
        state = "failed"
        try:
            supervisor.open(self._config.search.num_slots)  # first: they take longest
            ray.get(policy.ready.remote())
            state = self._follow(policy, supervisor)
        finally:
            with contextlib.suppress(RayError):
                ray.get(policy.set_state.remote("stopping"), timeout=5.0)
            if self._num_signals < 2 and not supervisor.close(_CLOSE_TIMEOUT_S):
                logger.warning("not all slots closed within %g s; their processes are ended", _CLOSE_TIMEOUT_S)
            with contextlib.suppress(RayError):
                ray.get(policy.end_run.remote(state), timeout=10.0)
            ray.kill(policy)
        return state

    def _follow(self, policy: Any, supervisor: Supervisor) -> str:
        """Start the search and wait for its end, a signal, or a request to stop."""
        from orchestrator.tune.search import Search

        search = Search(self._config, self._spec.metric, self._spec.mode, str(self._run_dir))
        search.start(policy, ACTOR_NAME, self._namespace)
        ray.get(policy.set_state.remote("running"))
        give_up_s = time.monotonic() + self._config.slots.open_timeout_s
        while not search.join(_POLL_S):
            if supervisor.gave_up is not None:
                search.interrupt()
                raise WorkerGroupError(f"slots cannot be opened: {supervisor.gave_up}")
            if time.monotonic() > give_up_s:
                self._require_a_slot(policy, search)
                give_up_s = float("inf")
            wish = self._wish_to_stop()
            if wish == "now":
                return "interrupted"
            if wish == "graceful":
                self._interrupt(policy)
                search.interrupt()
                search.join(_GRACE_S)
                return "interrupted"
        if search.error is not None:
            logger.error("the search failed: %s", search.error)
            return "failed"
        trials = ray.get(policy.status.remote())["trials"]
        return "done" if any(trial["state"] in {"done", "stopped"} for trial in trials) else "failed"

    def _require_a_slot(self, policy: Any, search: Search) -> None:
        """Stock Ray Train retries for ever what can never be met; a run says so."""
        if any(slot["epoch"] for slot in ray.get(policy.status.remote())["slots"]):
            return
        search.interrupt()
        slots, trial = self._config.slots, self._config.trial
        raise UnfitEnvironmentError(
            f"no slot opened within {slots.open_timeout_s:g} s; each needs {trial.num_workers} workers with"
            f" {self._slot_spec().cpus_per_worker:g} CPUs each, and the cluster has {ray.cluster_resources()} of which"
            f" {ray.available_resources()} are free; free some, lower search.max_concurrent or trial.num_workers, or"
            " raise slots.open_timeout_s"
        )

    def _wish_to_stop(self) -> str | None:
        """Whether a signal or another process asked for the end: 'graceful', 'now' or None."""
        if self._num_signals >= 2:
            return "now"
        if self._num_signals == 1:
            return "graceful"
        try:
            return "now" if (self._run_dir / "control" / "stop").read_text().strip() == "now" else "graceful"
        except OSError:
            return None

    def _interrupt(self, policy: Any) -> None:
        """Let every running trial commit and leave its slot."""
        _say("interrupted: trials write a checkpoint and leave; once more to stop at once")
        ray.get(policy.set_state.remote("stopping"))
        ray.get(policy.interrupt.remote())
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s and self._num_signals < 2:
            slots = ray.get(policy.status.remote())["slots"]
            if not any(slot["trial_id"] for slot in slots):
                return
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Count interrupts while the run goes on; installed after `ray.init`, which installs its own."""

        def note(_number: int, _frame: object) -> None:
            self._num_signals += 1

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _slot_spec(self) -> SlotSpec:
        config = self._config
        cpus = float(ray.cluster_resources().get("CPU", 1.0))
        num_ranks = config.search.num_slots * config.trial.num_workers
        warm_up = TrialOrder(
            trial_id=TrialId("warm-up"),
            attempt=0,
            seed=config.seed,
            job=config.job.name,
            params=dict(middle_params(config)),
            start=self._spec.start,
            limits=self._spec.limits,
            samples_per_report=1,
            max_reports=1,
            directory=str(self._run_dir / "trials" / "warm-up"),
            resume_from=None,
            num_reports_done=0,
        )
        return SlotSpec(
            num_workers=config.trial.num_workers,
            cpus_per_worker=max(0.01, int(100 * min(1.0, cpus / num_ranks)) / 100),
            gpus_per_worker=0.0,
            loop_config={
                "actor": ACTOR_NAME,
                "namespace": self._namespace,
                "send_period_s": config.telemetry.send_period_s,
                "max_units": config.cluster.num_cpus,
                "warm_up": warm_up,
                "log_level": self._spec.log_level,
            },
            storage_path=str(self._run_dir / "slots"),
        )


@contextlib.contextmanager
def _single_driver(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process.

    Raises:
        ConfigError: another process holds it.
    """
    import fcntl

    with (run_dir / "control" / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process runs {run_dir}; follow it with: orchestrator watch {run_dir}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _say(text: str) -> None:
    """Print for people."""
    import sys

    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
