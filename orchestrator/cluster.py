"""The Ray cluster a run takes place in: an own one or a running one, and what a run has left in it.

Knows nothing of trials or plans. Used by the driver only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator

import psutil
import ray

from orchestrator.config.model import ClusterSection
from orchestrator.errors import UnfitEnvironmentError
from orchestrator.share.cpu_cores import WORKER_ENVIRONMENT

_POLL_S = 0.2
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


@contextlib.contextmanager
def ray_cluster(
    cluster: ClusterSection, namespace: str, *, is_quiet: bool = True, uses_gpus: bool = True
) -> Iterator[None]:
    """A cluster to run in: an own one with its own short temporary directory, or a running one.

    Args:
        cluster: which.
        namespace: of the actors of this process.
        is_quiet: whether Ray Tune shall neither print nor write files of its own.
        uses_gpus: whether an own cluster offers this machine's GPUs, or leaves them to others.

    Raises:
        UnfitEnvironmentError: it does not start or cannot be reached.
    """
    for name, value in (_ENVIRONMENT | (_QUIET if is_quiet else {})).items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    is_own = cluster.address == "local"
    # Unix sockets allow 107 bytes of path; a directory of its own keeps other clusters of this machine out of sight.
    temporary = tempfile.mkdtemp(prefix="orch-", dir="/tmp") if is_own else None
    try:
        _start(cluster, namespace, temporary, uses_gpus=uses_gpus)
        yield
    finally:  # also where somebody interrupts the start
        ray.shutdown()
        if temporary is not None:
            os.environ.pop("RAY_TMPDIR", None)
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)
            shutil.rmtree(temporary, ignore_errors=True)


def _start(cluster: ClusterSection, namespace: str, temporary: str | None, *, uses_gpus: bool) -> None:
    """Start Ray in that directory, or connect to a running cluster where there is none.

    Raises:
        UnfitEnvironmentError: it does not start or cannot be reached.
    """
    try:
        if temporary is not None:
            num_gpus = {"num_gpus": 0} if not uses_gpus else {}
            port = _free_port()
            os.environ["RAY_TMPDIR"] = temporary
            # Ray's own clean-up of a dead slot asks the State API, and cannot find it by itself beside another cluster.
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
            ray.init(
                address="local",
                num_cpus=cluster.num_cpus or len(os.sched_getaffinity(0)),
                **num_gpus,
                namespace=namespace,
                include_dashboard=True,  # it serves the State API
                dashboard_port=port,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        else:
            environment = {"env_vars": dict(_ENVIRONMENT)}
            ray.init(
                address=cluster.address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
    except Exception as error:
        raise UnfitEnvironmentError(
            f"Ray does not start at address {cluster.address!r}: {error}; see: orchestrator doctor"
        ) from error


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


def num_child_processes(timeout_s: float = 10.0) -> int:
    """Children this process still has after Ray was shut down."""
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=timeout_s)
    return sum(1 for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
