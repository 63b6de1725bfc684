"""The policy actor that the runs of a cluster share, for whoever starts, ends or looks at it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from orchestrator.config.cluster_file import ClusterFile
from orchestrator.control.cluster_spec import ClusterSpec
from orchestrator.control.snapshots import code_version
from orchestrator.control_plane import on_head
from orchestrator.errors import OrchestratorError, UnfitEnvironmentError
from orchestrator.policy_handle import SHARED_NAME, SHARED_NAMESPACE, shared_actor
from orchestrator.requests import asker


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a running cluster.

    Raises:
        UnfitEnvironmentError: there is none at that address.
    """
    try:
        ray.init(address=address, namespace=SHARED_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnfitEnvironmentError(
            f"no Ray cluster answers at {address!r}: {first}; allowed: auto on a node of it, or host:port"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def up(file: ClusterFile) -> dict[str, Any]:
    """Start the shared policy actor, or change the one that is there; what it is for.

    Raises:
        OrchestratorError: the one that is there refuses the change.
    """
    spec = ClusterSpec(
        version=code_version(),
        owner=asker(),
        storage=str(Path(file.storage).absolute()),
        policy=file.policy.name,
        policy_params=dict(file.policy.params),
        places=file.places,
        period_s=file.policy.period_s,
        deadline_s=file.policy.deadline_s,
        idle_timeout_s=file.idle_timeout_s,
        quotas=dict(file.quotas),
    )
    actor = shared_actor()
    if actor is not None:
        why_not = ray.get(actor.change.remote(spec))
        if why_not:
            raise OrchestratorError(f"the policy actor of this cluster stays as it is: {why_not}")
    else:
        from orchestrator.control.cluster_actor import ClusterActor

        actor = on_head(ClusterActor, SHARED_NAME, SHARED_NAMESPACE).remote(spec)
    found: dict[str, Any] = ray.get(actor.ready.remote())
    return found


def down(*, is_forced: bool) -> list[str]:
    """End the shared policy actor; the runs that it had.

    Raises:
        OrchestratorError: there is none, or runs go on.
    """
    actor = _required()
    runs = [str(row["name"]) for row in ray.get(actor.queue.remote())["runs"]]
    if runs and not is_forced:
        raise OrchestratorError(
            f"{len(runs)} runs go on: {', '.join(runs)}; allowed: stop them first, or --force, which leaves them"
            " without a policy actor"
        )
    with contextlib.suppress(RayActorError):
        ray.get(actor.down.remote())
    return runs


def queue() -> dict[str, Any]:
    """The runs of this cluster, what each holds and what it waits for.

    Raises:
        OrchestratorError: nobody started a shared policy actor.
    """
    found: dict[str, Any] = ray.get(_required().queue.remote())
    return found


def _required() -> Any:
    actor = shared_actor()
    if actor is None:
        raise OrchestratorError("no policy actor is shared on this cluster; allowed: orchestrator up first")
    return actor
