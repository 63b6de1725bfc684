"""Device agents on the GPU nodes of a Ray cluster: one actor per node, opened before the slots and closed after them.

Not detached: an agent ends with the driver, and MPS with the agent. Used by the driver only.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.devices.agent import DeviceAgent, NodeReady
from orchestrator.devices.choice import GpuShare
from orchestrator.errors import UnfitEnvironmentError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 60.0


class _NodeAgent(DeviceAgent):
    """The agent of one node, with a way to the policy actor."""

    def tell(self, actor_name: str, namespace: str) -> list[str]:
        """Begin to sample the node's GPUs and tell the policy actor; returns what cannot be read."""
        policy = ray.get_actor(actor_name, namespace=namespace)
        return self.watch(policy.take_device_samples.remote)


class Agents:
    """The agents of one run.

    Args:
        wish: how GPUs shall be shared.
        turns_shares: whether shares differ or change in the run.
        token: a few characters that no other run has; names the directory of an own MPS, alike on all nodes.
    """

    def __init__(self, wish: str, *, turns_shares: bool, token: str) -> None:
        self._wish, self._turns_shares, self._token = wish, turns_shares, token
        self._agents: list[Any] = []

    def open(self) -> NodeReady:
        """Start one on every GPU node; what they found, which must be the same everywhere.

        Raises:
            UnfitEnvironmentError: no node has a GPU, or nodes differ in what they offer.
        """
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
        if not nodes:
            raise UnfitEnvironmentError(
                "devices.use is gpu and Ray sees no GPU on any node; check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or "
                "set devices.use: cpu"
            )
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            actor = ray.remote(_NodeAgent).options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=2)
            self._agents.append(actor.remote(self._wish, turns_shares=self._turns_shares, token=self._token))
        found: list[NodeReady] = ray.get([agent.prepare.remote() for agent in self._agents], timeout=_TIMEOUT_S)
        return _common(found)

    def watch(self, actor_name: str, namespace: str) -> None:
        """Let every agent tell the policy actor what its GPUs do."""
        told = [agent.tell.remote(actor_name, namespace) for agent in self._agents]
        for problems in ray.get(told, timeout=_TIMEOUT_S):
            for problem in problems:
                logger.warning("%s", problem)

    def close(self) -> None:
        """Stop what they started, and end them."""
        for agent in self._agents:
            with contextlib.suppress(RayError):
                ray.get(agent.stop.remote(), timeout=5.0)
            ray.kill(agent)
        self._agents = []


def _common(found: list[NodeReady]) -> NodeReady:
    """What all nodes can do: SM groups only where all have them, and own daemons only one per run and node."""
    order = (GpuShare.TIME_SLICE, GpuShare.MPS, GpuShare.SM_GROUPS)
    weakest = min(found, key=lambda each: order.index(each.share))
    environments = {tuple(sorted(each.environment.items())) for each in found}
    if len(environments) > 1:  # each worker group has one environment, wherever its ranks are
        return NodeReady(
            share=GpuShare.TIME_SLICE,
            words=f"time_slice; no mps: the daemons of {len(found)} nodes have different directories",
            environment={},
            is_under_mps=False,
        )
    return weakest


def gpu_part(num_gpus: float, num_ranks: int) -> float:
    """The part of a GPU that each rank reserves from Ray: whole GPUs where there are enough, else equal parts."""
    ranks_per_gpu = math.ceil(num_ranks / max(1.0, num_gpus))
    return math.floor(10_000 / ranks_per_gpu) / 10_000  # Ray counts in ten-thousandths
