"""Device agents on the GPU nodes of a Ray cluster: one actor per node, opened before the slots and closed after them.

A node that joins later gets one too. Not detached: an agent ends with the driver, and MPS with the agent. Used by the
driver only.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.devices.agent import DeviceAgent, NodeReady
from orchestrator.devices.roster import Roster
from orchestrator.errors import ShareError, UnfitEnvironmentError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 60.0
_POLL_S = 0.1


class _NodeAgent(DeviceAgent):
    """The agent of one node, with a way to the policy actor."""

    def tell(self, actor_name: str, namespace: str) -> list[str]:
        """Begin to sample the node's GPUs and tell the policy actor; returns what cannot be read."""
        policy = ray.get_actor(actor_name, namespace=namespace)
        return self.watch(policy.take_device_samples.remote)


class _RemoteAgent:
    """An agent from afar; see `orchestrator.devices.roster.Agent`."""

    def __init__(self, actor: Any, policy: tuple[str, str]) -> None:  # noqa: ANN401 -- handles have no type
        self._actor, self._policy = actor, policy
        self._preparing = actor.prepare.remote()
        self._telling: Any = None

    def found(self) -> NodeReady | None:
        if not _is_done(self._preparing):
            return None
        try:
            ready: NodeReady = ray.get(self._preparing)
        except RayError as error:
            raise ShareError(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}") from error
        return ready

    def watch(self) -> list[str] | None:
        if self._telling is None:
            self._telling = self._actor.tell.remote(*self._policy)
        if not _is_done(self._telling):
            return None
        try:
            problems: list[str] = ray.get(self._telling)
        except RayError as error:
            return [f"its GPUs are not watched: {type(error).__name__}"]
        return problems

    def drop(self) -> None:
        with contextlib.suppress(RayError):
            ray.get(self._actor.stop.remote(), timeout=5.0)
        with contextlib.suppress(RayError):
            ray.kill(self._actor)


def _is_done(reference: ray.ObjectRef) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


class Agents:
    """The agents of one run.

    Args:
        wish: how GPUs shall be shared.
        turns_shares: whether shares differ or change in the run.
        token: a few characters that no other run has; names the directory of an own MPS, alike on all nodes.
        policy: name and namespace of the policy actor, which is told what GPUs do.
    """

    def __init__(self, wish: str, *, turns_shares: bool, token: str, policy: tuple[str, str]) -> None:
        self._wish, self._turns_shares, self._token, self._policy = wish, turns_shares, token, policy
        self._roster = Roster(self._spawn)

    def open(self) -> NodeReady:
        """Start one on every GPU node that is there; what they found, which must be the same everywhere.

        Raises:
            UnfitEnvironmentError: no node has a GPU, or the agents do not answer.
        """
        node_ids = gpu_nodes(ray.nodes())
        if not node_ids:
            raise UnfitEnvironmentError(
                "devices.use is gpu and Ray sees no GPU on any node; check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or "
                "set devices.use: cpu"
            )
        deadline_s = time.monotonic() + _TIMEOUT_S
        self._roster.follow(node_ids)
        while self._roster.is_looking and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            self._roster.follow(node_ids)
        settled = self._roster.settle()
        if settled is None or self._roster.is_looking:
            raise UnfitEnvironmentError(
                f"the agents of {len(node_ids)} GPU nodes did not say within {_TIMEOUT_S:g} s what these offer; see the"
                " warnings above, or set devices.use: cpu"
            )
        return settled

    def follow(self, nodes: Iterable[Mapping[str, Any]]) -> frozenset[str]:
        """Take the nodes that are there; returns the GPU nodes that serve. Called about once a second."""
        serving = self._roster.follow(gpu_nodes(nodes))
        self._roster.watch()
        return serving

    def settle(self) -> NodeReady | None:
        """How GPUs are shared from here on, once a node has said what it offers."""
        return self._roster.settle()

    def close(self) -> None:
        """Stop what they started, and end them."""
        self._roster.close()

    def _spawn(self, node_id: str) -> _RemoteAgent:
        strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        actor = ray.remote(_NodeAgent).options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=2)
        return _RemoteAgent(actor.remote(self._wish, turns_shares=self._turns_shares, token=self._token), self._policy)


def gpu_nodes(nodes: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ids of the nodes that are there and have a GPU."""
    return [node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
