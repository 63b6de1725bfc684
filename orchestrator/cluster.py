"""The Ray cluster a run takes place in: an own one or a running one, and what a run has left in it.

Knows nothing of trials or plans. Used by the driver only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import ray

from orchestrator.config.model import ClusterSection
from orchestrator.errors import UnfitEnvironmentError
from orchestrator.host import is_short, without_proxy
from orchestrator.leftovers import make_home, processes_of, remove_home
from orchestrator.output import LOG_NAME
from orchestrator.processes import still_there
from orchestrator.share.cpu_cores import WORKER_ENVIRONMENT

_POLL_S, _START_POLL_S = 0.2, 0.02
_START_GRACE_S = 6.0
"""How long a start that nobody wants any more may go on before its processes are ended."""
_SHUTDOWN_S = 20.0
_LEAVE_S = 15.0
"""How long processes of an own cluster may take to end after its shutdown."""
_RAY_TRAIN_COORDINATOR = "_AutoscalingCoordinatorActor"
"""Ray Train keeps one of these per cluster, for every run on it; it goes with the cluster."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a slot that ends is noticed sooner; nothing is reported through it
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # two processes per slot less; slots are told to close by the actor
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # what a training prints goes to its log as it is, not through a logger
    **WORKER_ENVIRONMENT,
}
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are in our own journal and tables
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # how old Tune's own state may be when a search that needs it is taken up
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is interrupted before its first report has no metric
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output is silent when it is told to be
}
"""For a search of ours; one of the user's own writes and says what Tune writes and says."""
_LOOPBACK_LINKS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Ranks of one machine find each other without a port that others can reach."""
_TOKEN_NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_TOKEN = secrets.token_hex(32)
"""Of the clusters that this process starts: Ray reads a token once per process and keeps it."""
_RAY_PROCESSES = frozenset({"gcs_server", "raylet"})

_is_starting = threading.Event()


def _leave_group() -> None:
    """Give each of Ray's processes a process group of its own.

    What ends a run usually signals its whole group: `timeout`, a shell, a terminal that hangs up. Ray's processes would
    be gone before the trials have written their checkpoints.
    """
    if _is_starting.is_set():
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)


# Ray starts each of its processes with a `preexec_fn`, and Python calls these functions before it.
os.register_at_fork(after_in_child=_leave_group)


class StartGivenUpError(Exception):
    """The run was asked to end before Ray had started."""


class RayCluster:
    """A cluster to run in, an own one or a running one, from start to shutdown, in one thread of its own.

    The kernel ends Ray's processes with the thread that started them, and in the main thread `ray.init` would replace
    the handlers of signals.

    Attributes:
        home: the short temporary directory of an own cluster while it is open, None of another.
        is_abandoned: whether Ray shall be ended without a shutdown.
        is_stuck: whether Ray had to be ended the hard way; its thread then still waits for something.
        num_left: processes of an own cluster that had not ended some seconds after its shutdown, or could not be ended.
    """

    def __init__(
        self,
        cluster: ClusterSection,
        namespace: str,
        run_dir: Path,
        *,
        is_quiet: bool = True,
        uses_gpus: bool = True,
    ) -> None:
        """Nothing is started yet.

        Args:
            cluster: which.
            namespace: of the actors of this process.
            run_dir: of the run it is for.
            is_quiet: whether Ray Tune shall neither print nor write files of its own.
            uses_gpus: whether an own cluster offers this machine's GPUs, or leaves them to others.
        """
        self._cluster, self._namespace, self._run_dir = cluster, namespace, run_dir
        self._is_quiet, self._uses_gpus = is_quiet, uses_gpus
        self._has_begun, self._is_over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._servers: list[psutil.Process] = []
        self.home: Path | None = None
        self.is_stuck, self.is_abandoned, self.num_left = False, False, 0
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)

    @contextlib.contextmanager
    def opened(self, is_unwanted: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Start it, and shut it down afterwards.

        Args:
            is_unwanted: whether the run was asked to end; looked at until Ray has started.

        Raises:
            UnfitEnvironmentError: it does not start or cannot be reached.
            StartGivenUpError: the run was asked to end before it had.
        """
        logging.getLogger("ray").setLevel(logging.ERROR)
        is_own = self._cluster.address == "local"
        self.home = _own_home(self._run_dir) if is_own else None
        defaults = _ENVIRONMENT | (_QUIET if self._is_quiet else {}) | (_LOOPBACK_LINKS if is_own else {})
        with _environment(defaults, _forced(self.home)):
            try:
                self._begin(is_unwanted)
                yield
            finally:  # also where somebody interrupts the start
                self._end()

    def _begin(self, is_unwanted: Callable[[], bool]) -> None:
        """Start it and wait until it has."""
        self._thread.start()
        while not self._has_begun.wait(_START_POLL_S):
            if is_unwanted():
                raise StartGivenUpError
        if self._error is not None:
            raise self._error
        if self.home is not None:
            children = psutil.Process().children()
            self._servers = [child for child in children if _name(child) in _RAY_PROCESSES]

    @property
    def is_there(self) -> bool:
        """Whether the processes of an own cluster live; another's are not looked at."""
        return all(server.is_running() and _status(server) != psutil.STATUS_ZOMBIE for server in self._servers)

    def require(self) -> None:
        """Look whether an own cluster is still there.

        Raises:
            UnfitEnvironmentError: a process of it has ended.
        """
        if not self.is_there:
            raise UnfitEnvironmentError(
                "a process of Ray ended while the run went on: somebody ended it, or memory ran out;"
                " `orchestrator resume` goes on from the last checkpoints"
            )

    def abandon(self) -> None:
        """End an own cluster without a shutdown: threads wait for it still, and a shutdown can end the process."""
        self.is_abandoned = self.home is not None

    def _end(self) -> None:
        """Shut it down, end what does not end by itself, and remove the directory of an own cluster."""
        if not self.is_abandoned:
            self._is_over.set()
        if self._thread.is_alive() and not self.is_abandoned:
            self._thread.join(_SHUTDOWN_S if self._has_begun.is_set() else _START_GRACE_S)
        self.is_stuck = self._thread.is_alive()
        if self.home is not None:
            if not self.is_stuck:
                self.num_left = len(still_there(processes_of(self.home), _LEAVE_S))
            self.num_left = max(self.num_left, remove_home(self.home))

    def _live(self) -> None:
        try:
            _start(self._cluster, self._namespace, self.home, uses_gpus=self._uses_gpus)
        except Exception as error:
            self._error = _in_one_message(self._cluster.address, error, self._run_dir / LOG_NAME)
        except BaseException as error:
            self._error = error
        self._has_begun.set()
        self._is_over.wait()
        ray.shutdown()


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.Error:
        return str(psutil.STATUS_ZOMBIE)


def _own_home(run_dir: Path) -> Path:
    """The temporary directory of an own cluster; a directory of its own also keeps other clusters out of sight.

    Raises:
        UnfitEnvironmentError: there is no place for it.
    """
    try:
        return make_home(run_dir)
    except OSError as error:
        raise UnfitEnvironmentError(
            f"no place for Ray's sockets ({error}); allowed: one of these directories that you may write to"
        ) from None


def _forced(home: Path | None) -> dict[str, str]:
    """What the environment must say for Ray to work here; put back afterwards."""
    found = without_proxy(os.environ)
    if home is None:
        return found
    found |= {"RAY_TMPDIR": str(home), "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{_free_port()}"}
    if os.environ.get("TMPDIR") and not is_short(os.environ["TMPDIR"]):
        found["TMPDIR"] = str(home)  # processes of Ray keep sockets there
    if not any(os.environ.get(name) for name in _TOKEN_NAMES):
        found["RAY_AUTH_TOKEN"] = (
            _TOKEN  # else Ray writes one into the user's home, and asks every later cluster for it
        )
    return found


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str], forced: Mapping[str, str]) -> Iterator[None]:
    """The environment with these values, the first only where it says nothing; as it was afterwards."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in defaults.items() if name not in before} | dict(forced))
    try:
        yield
    finally:
        for name in (*defaults, *forced, "RAY_AUTH_MODE"):  # Ray sets the last one for a cluster that it starts
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def _start(cluster: ClusterSection, namespace: str, home: Path | None, *, uses_gpus: bool) -> None:
    """Start Ray in that directory, or connect to a running cluster where there is none."""
    try:
        if home is not None:
            with _on_loopback():
                _is_starting.set()
                _start_own(cluster, namespace, uses_gpus=uses_gpus)
        else:
            environment = {"env_vars": dict(_ENVIRONMENT)}
            ray.init(
                address=cluster.address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
    finally:
        _is_starting.clear()


def _in_one_message(address: str, error: Exception, log: Path) -> UnfitEnvironmentError:
    """What keeps Ray from starting, in a line; all that Ray says goes to the run's log."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    details = ""
    if more:
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(f"{error}\n")
            details = f"; all of it: {log}"
    return UnfitEnvironmentError(
        f"Ray does not start at address {address!r}: {first}{details}; see: orchestrator doctor"
    )


def _start_own(cluster: ClusterSection, namespace: str, *, uses_gpus: bool) -> None:
    num_gpus = {"num_gpus": 0} if not uses_gpus else {}
    ray.init(
        address="local",
        num_cpus=cluster.num_cpus or len(os.sched_getaffinity(0)),
        **num_gpus,
        namespace=namespace,
        include_dashboard=True,  # it serves the State API
        # Ray's own clean-up of a dead slot asks the State API, and cannot find it by itself beside another cluster.
        dashboard_port=int(os.environ["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]),
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray's processes listen on the loopback interface only.

    Ray does so where it takes a machine for one that makes no clusters. Its only public form, an environment variable,
    is read when Ray is imported, which a user's own program has done already.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cluster_leaks(timeout_s: float = 10.0) -> dict[str, int]:
    """Actors and placement groups of this job that are still there when nothing should be; what ends soon may end."""
    from ray.util.state import list_actors, list_placement_groups

    context = ray.get_runtime_context()
    job_id, address = context.get_job_id(), context.gcs_address
    deadline_s = time.monotonic() + timeout_s
    while True:
        actors = list_actors(address, filters=[("job_id", "=", job_id), ("state", "!=", "DEAD")], limit=10_000)
        groups = list_placement_groups(
            address, filters=[("creator_job_id", "=", job_id), ("state", "!=", "REMOVED")], limit=10_000
        )
        ours = [actor for actor in actors if actor.class_name != _RAY_TRAIN_COORDINATOR]
        leaks = {"actors": len(ours), "placement_groups": len(groups)}
        if not any(leaks.values()) or time.monotonic() > deadline_s:
            return leaks
        time.sleep(_POLL_S)
