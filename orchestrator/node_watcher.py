"""Looks at the cluster's nodes once a second, tells the policy actor, and lets as many slots open as there is room.

A thread of the driver. Public Ray API except for one call, `draining_node_ids`, of which Ray has no public form.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.control.nodes import NodeView
from orchestrator.supervisor import SlotSpec, Supervisor

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
_ANY = 2**30
"""Ranks of a cluster that grows."""


class NodeWatcher:
    """Watches from `start` to `stop`.

    Args:
        policy: the policy actor.
        supervisor: who opens slots.
        spec: what a slot needs of its node.
        num_slots: slots of the run, at most.
        max_cores: at most so many cores of a node count, None for all.
        is_resizing: whether slots of other sizes may open beside them, for trials that change their number of ranks.
        is_scaling: whether slots that trials wait for may open without room. Ray's autoscaler then sees what they need
            through Ray Train, whose coordinator is the only one that speaks to it, and is released when they close.
    """

    def __init__(
        self,
        policy: Any,
        supervisor: Supervisor,
        spec: SlotSpec,
        num_slots: int,
        *,
        max_cores: int | None = None,
        is_scaling: bool = False,
        is_resizing: bool = False,
    ) -> None:
        self._policy, self._supervisor, self._spec, self._num_slots = policy, supervisor, spec, num_slots
        self._max_cores, self._is_scaling, self._is_resizing = max_cores, is_scaling, is_resizing
        self._is_over = threading.Event()
        self._last: tuple[NodeView, ...] | None = None
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)

    def start(self) -> None:
        """Look for the first time, and go on in a thread of its own."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def look(self) -> None:
        """Tell who is there, if that has changed, and how many slots may be open."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        draining = draining_node_ids()
        views = tuple(
            sorted((self._view(node, node["NodeID"] in draining) for node in nodes), key=lambda view: view.node_id)
        )
        if views != self._last:
            ray.get(self._policy.nodes.remote(views), timeout=30.0)
            self._last = views
        staying = [node["Resources"] for node in nodes if node["NodeID"] not in draining]
        allowed = num_slots_with_room(self._spec, staying)
        if self._is_scaling:
            allowed = max(allowed, int(ray.get(self._policy.num_slots_worth.remote(), timeout=30.0)))
        self._supervisor.allow(min(self._num_slots, allowed))
        if self._is_resizing:
            sizes = tuple(ray.get(self._policy.slots_to_open.remote(), timeout=30.0))
            num_ranks = num_workers_with_room(self._spec, staying)
            self._supervisor.open_beside(sizes, _ANY if self._is_scaling else num_ranks)

    def _view(self, node: dict[str, Any], is_draining: bool) -> NodeView:
        resources = node["Resources"]
        num_cores = 0 if resources.get("GPU") else int(resources.get("CPU", 0))
        if self._max_cores is not None:
            num_cores = min(num_cores, self._max_cores)
        return NodeView(node_id=node["NodeID"], num_cores=num_cores, is_draining=is_draining)

    def _watch(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            try:
                self.look()
            except (RayError, TimeoutError) as error:
                logger.warning("the cluster's nodes could not be read: %s", error)


def num_slots_with_room(spec: SlotSpec, nodes: list[dict[str, float]]) -> int:
    """Slots that nodes with these resources can hold, whatever is running there now."""
    return num_workers_with_room(spec, nodes) // spec.num_workers


def num_workers_with_room(spec: SlotSpec, nodes: list[dict[str, float]]) -> int:
    """Ranks that nodes with these resources can hold."""
    wanted = {name: amount for name, amount in spec.resources.items() if amount}
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()) for node in nodes)


def draining_node_ids() -> frozenset[str]:
    """Nodes that were told to leave (a spot notice, or the autoscaler). Not public in Ray: none where it is missing."""
    try:
        found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    except AttributeError:
        return frozenset()
    return frozenset(found)
