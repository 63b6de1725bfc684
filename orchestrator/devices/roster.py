"""Which GPU nodes have an agent: one is started when a node joins and dropped when it leaves. No Ray.

The ranks of a run have one environment wherever they are, so the first agents settle how GPUs are shared, and a node
that joins later serves only if it can do the same. Asked about once a second; never waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from orchestrator.devices.agent import NodeReady
from orchestrator.devices.choice import GpuShare
from orchestrator.errors import ShareError

logger = logging.getLogger(__name__)

RETRY_S = 30.0
_ORDER = (GpuShare.TIME_SLICE, GpuShare.MPS, GpuShare.SM_GROUPS)


class Agent(Protocol):
    """The agent of one node, somewhere else; no method waits."""

    def found(self) -> NodeReady | None:
        """What it found on its node, None as long as it looks. Raises ShareError when it died over that."""
        ...

    def watch(self) -> list[str] | None:
        """Tell the policy actor what the node's GPUs do; what cannot be read, None as long as that is not known."""
        ...

    def drop(self) -> None:
        """End it, if it is still there."""
        ...


class Roster:
    """The agents of one run.

    Args:
        spawn: starts the agent of a node.
        now_s: monotonic time, for tests.

    Attributes:
        settled: how the GPUs of this run are shared; None until `settle`.
    """

    def __init__(self, spawn: Callable[[str], Agent], now_s: Callable[[], float] = time.monotonic) -> None:
        self._spawn, self._now_s = spawn, now_s
        self._agents: dict[str, Agent] = {}
        self._found: dict[str, NodeReady] = {}
        self._watched: set[str] = set()
        self._retry_s: dict[str, float] = {}
        self.settled: NodeReady | None = None

    def follow(self, node_ids: Iterable[str]) -> frozenset[str]:
        """Take the GPU nodes that are there; returns those that serve by now."""
        there = set(node_ids)
        for node_id in self._agents.keys() - there:
            self._forget(node_id)
            logger.info("devices.left %s", node_id[:8])
        for node_id in sorted(there - self._agents.keys()):
            if self._now_s() >= self._retry_s.get(node_id, 0.0):
                self._agents[node_id] = self._spawn(node_id)
        for node_id in sorted(self._agents.keys() - self._found.keys()):
            self._look(node_id)
        return frozenset(node_id for node_id, ready in self._found.items() if self._serves(ready))

    @property
    def is_looking(self) -> bool:
        """Whether an agent has not said yet what it found."""
        return bool(self._agents.keys() - self._found.keys())

    def settle(self) -> NodeReady | None:
        """How GPUs are shared from here on: what all nodes that are known can do; None where there is none."""
        if self.settled is None and self._found:
            self.settled = common(list(self._found.values()))
        return self.settled

    def watch(self) -> None:
        """Let every agent that is ready tell the policy actor what its GPUs do."""
        for node_id in self._found.keys() - self._watched:
            problems = self._agents[node_id].watch()
            if problems is not None:
                self._watched.add(node_id)
                for problem in problems:
                    logger.warning("node %s: %s", node_id[:8], problem)

    def close(self) -> None:
        """End all agents."""
        for node_id in list(self._agents):
            self._forget(node_id)

    def _look(self, node_id: str) -> None:
        try:
            ready = self._agents[node_id].found()
        except ShareError as error:
            logger.warning("the GPU agent of node %s failed, again in %g s: %s", node_id[:8], RETRY_S, error)
            self._forget(node_id)
            self._retry_s[node_id] = self._now_s() + RETRY_S
            return
        if ready is None:
            return
        self._found[node_id] = ready
        if self.settled is not None and not self._serves(ready):
            logger.warning(
                "no slot opens on node %s: it offers %s, and this run shares its GPUs by %s",
                node_id[:8],
                ready.words,
                self.settled.words,
            )

    def _serves(self, ready: NodeReady) -> bool:
        """Whether ranks of this run can be on a node."""
        settled = self.settled
        if settled is None or settled.share is GpuShare.TIME_SLICE:
            return True
        is_alike = ready.environment == settled.environment
        return is_alike and _ORDER.index(ready.share) >= _ORDER.index(settled.share)

    def _forget(self, node_id: str) -> None:
        self._agents.pop(node_id).drop()
        self._found.pop(node_id, None)
        self._watched.discard(node_id)


def common(found: list[NodeReady]) -> NodeReady:
    """What all nodes can do: SM groups only where all have them, and own daemons only one per run and node."""
    weakest = min(found, key=lambda each: _ORDER.index(each.share))
    environments = {tuple(sorted(each.environment.items())) for each in found}
    if len(environments) > 1:  # each worker group has one environment, wherever its ranks are
        return NodeReady(
            share=GpuShare.TIME_SLICE,
            words=f"time_slice; no mps: the daemons of {len(found)} nodes have different directories",
            environment={},
            is_under_mps=False,
        )
    return weakest
