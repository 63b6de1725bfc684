"""Looks at the cluster's nodes once a second, tells the policy actor, and lets as many slots open as there is room.

Where nodes can be asked for, it also passes the policy's wish on to the one who asks (`orchestrator.node_requests`),
and keeps slots off the nodes that are let go. A thread of the driver. Public Ray API except for one call,
`draining_node_ids`, of which Ray has no public form.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.control.nodes import NodeOrder, NodeView
from orchestrator.errors import OrchestratorError
from orchestrator.node_requests import NodeRequests
from orchestrator.supervisor import SlotSpec, Supervisor

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
_ANY = 2**30
"""Ranks of a cluster that grows."""
_GROUP_LABEL = "ray.io/node-group"
_HEAD = "node:__internal_head__"


class NodeWatcher:
    """Watches from `start` to `stop`.

    Args:
        policy: the policy actor.
        slots: who opens slots, what each needs of its node, and how many there may be; None as long as nobody does.
        max_cores: at most so many cores of a node count, None for all.
        is_resizing: whether slots of other sizes may open beside them, for trials that change their number of ranks.
        is_scaling: whether slots that trials wait for may open without room. Ray's autoscaler then sees what they need
            through Ray Train, whose coordinator is the only one that speaks to it, and is released when they close.
        requests: who asks for nodes, where the policy may wish for some.
        unfit: takes the nodes that are there, and says which of them cannot serve yet.
    """

    def __init__(
        self,
        policy: Any,
        slots: Callable[[], tuple[Supervisor, SlotSpec, int] | None],
        *,
        max_cores: int | None = None,
        is_scaling: bool = False,
        is_resizing: bool = False,
        requests: NodeRequests | None = None,
        unfit: Callable[[list[dict[str, Any]]], frozenset[str]] | None = None,
    ) -> None:
        self._node_types, self._requests = {} if requests is None else requests.resources, requests
        self._policy, self._slots, self._unfit = policy, slots, unfit
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
        avoided = draining | self._pass_on()
        if self._unfit is not None:
            avoided |= self._unfit(nodes)
        slots = self._slots()
        if slots is None:
            return
        supervisor, spec, num_slots = slots
        # Ray itself keeps off nodes that drain.
        supervisor.avoid(frozenset((avoided - draining) & {node["NodeID"] for node in nodes}))
        staying = [node["Resources"] for node in nodes if node["NodeID"] not in avoided]
        allowed = num_slots_with_room(spec, staying)
        if self._is_scaling:
            allowed = max(allowed, int(ray.get(self._policy.num_slots_worth.remote(), timeout=30.0)))
        supervisor.allow(min(num_slots, allowed))
        if self._is_resizing:
            sizes = tuple(ray.get(self._policy.slots_to_open.remote(), timeout=30.0))
            num_ranks = num_workers_with_room(spec, staying)
            supervisor.open_beside(sizes, _ANY if self._is_scaling else num_ranks)

    def _pass_on(self) -> frozenset[str]:
        """Ask for what the policy wishes for; returns the nodes that it lets go."""
        if self._requests is None:
            return frozenset()
        order: NodeOrder = ray.get(self._policy.node_order.remote(), timeout=30.0)
        self._requests.want(order.wanted)
        return frozenset(order.released)

    def _view(self, node: dict[str, Any], is_draining: bool) -> NodeView:
        resources = node["Resources"]
        num_cores = 0 if resources.get("GPU") else int(resources.get("CPU", 0))
        if self._max_cores is not None:
            num_cores = min(num_cores, self._max_cores)
        return NodeView(
            node_id=node["NodeID"],
            num_cores=num_cores,
            is_draining=is_draining,
            node_type=type_of(node, self._node_types),
        )

    def _watch(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            try:
                self.look()
            except (RayError, TimeoutError, OrchestratorError) as error:
                logger.warning("the cluster's nodes could not be read: %s", error)


def type_of(node: Mapping[str, Any], node_types: Mapping[str, Mapping[str, float]]) -> str:
    """The type of a node: the launcher's word for it, or else the one whose resources it has; empty for none."""
    resources, group = node["Resources"], str((node.get("Labels") or {}).get(_GROUP_LABEL, ""))
    if group in node_types or _HEAD in resources:
        return group if group in node_types else ""
    for name, has in sorted(node_types.items()):
        exact = all(resources.get(key, 0) == has.get(key, 0) for key in ("CPU", "GPU"))
        if exact and all(resources.get(key, 0) >= amount for key, amount in has.items()):
            return name
    return ""


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
