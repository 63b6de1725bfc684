"""The cluster's nodes as the controller knows them: who joined, who is about to leave, who is gone. No Ray.

A node's cores are in the ledger as soon as it joins, before any worker group runs there. One that drains (a spot
notice), or that the plan in force does not want any more, gives its trials back with a commit; one that is gone gives
them back without, at no charge to their restarts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.control.events import NodeChanged
from orchestrator.control.lifecycle import Slot, SlotState
from orchestrator.control.orders import StopMode
from orchestrator.control.state import RunState
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView

logger = logging.getLogger(__name__)


class NodeState(StrEnum):
    """Where a node is in its life."""

    JOINED = "joined"
    DRAINING = "draining"
    RELEASED = "released"
    LEFT = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node that is there.

    Attributes:
        node_id: its id.
        num_cores: what it offers to trials, 0 where trials run on its GPUs or not at all.
        is_draining: whether it was told to leave.
        node_type: its type in `RunSpec.node_types`; empty for none of them.
    """

    node_id: str
    num_cores: int
    is_draining: bool = False
    node_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOrder:
    """What the policy wants of the cluster: nodes of each type, and those of them that are let go."""

    wanted: dict[str, int]
    released: tuple[str, ...]


class Nodes:
    """The part of the controller that follows the cluster's nodes."""

    def __init__(
        self,
        state: RunState,
        stop: Callable[[TrialId, StopMode], None],
        lose: Callable[[str, str], None],
        close: Callable[[str], None],
    ) -> None:
        self._state, self._stop, self._lose, self._close = state, stop, lose, close

    def update(self, present: tuple[NodeView, ...]) -> None:
        """Take the list of nodes that are there; what differs from the last one has happened since."""
        state = self._state
        for node in present:
            known = state.nodes.get(node.node_id)
            if known is None or known is NodeState.LEFT:
                self._log(node.node_id, NodeState.JOINED, node.num_cores, node.node_type)
            if node.is_draining and state.nodes[node.node_id] is not NodeState.DRAINING:
                self._log(node.node_id, NodeState.DRAINING, node.num_cores, node.node_type)
                self._drain(node.node_id)
        there = {node.node_id for node in present}
        for node_id, known in list(state.nodes.items()):
            if node_id not in there and known is not NodeState.LEFT:
                for slot in slots_on(state, node_id):
                    self._lose(slot.slot_id, f"node {node_id[:8]} left the cluster")
                self._log(node_id, NodeState.LEFT, 0, state.node_types.get(node_id, ""))
        state.journal.sync()

    def settle(self) -> None:
        """Let go of nodes that the wish does not want any more, and take back those that it wants again."""
        state = self._state
        if not state.wishes:
            return
        for wish in state.wishes:
            ours = [node_id for node_id, name in state.node_types.items() if name == wish.node_type]
            stays = [node_id for node_id in ours if state.nodes[node_id] is NodeState.JOINED]
            released = [node_id for node_id in ours if state.nodes[node_id] is NodeState.RELEASED]
            back = sorted(released)[: max(0, wish.num_nodes - len(stays))]
            for node_id in released:
                if node_id in back:
                    self._log(node_id, NodeState.JOINED, state.node_cores.get(node_id, 0), wish.node_type)
                else:
                    self._drain(node_id)  # a slot may have been on its way there
            # The emptiest node costs the least to leave.
            stays.sort(key=lambda node_id: (self._num_trials(node_id), node_id))
            for node_id in stays[: max(0, len(stays) - wish.num_nodes)]:
                self._log(node_id, NodeState.RELEASED, state.node_cores.get(node_id, 0), wish.node_type)
                self._drain(node_id)
        state.journal.sync()

    def order(self) -> NodeOrder:
        """What the cluster shall be asked for."""
        state = self._state
        return NodeOrder(
            wanted={wish.node_type: wish.num_nodes for wish in state.wishes},
            released=tuple(sorted(key for key, known in state.nodes.items() if known is NodeState.RELEASED)),
        )

    def _num_trials(self, node_id: str) -> int:
        return sum(slot.trial_id is not None for slot in slots_on(self._state, node_id))

    def _drain(self, node_id: str) -> None:
        """Its trials commit and go to the front of the queue; its slots take no more and close."""
        for slot in slots_on(self._state, node_id):
            self._close(slot.slot_id)
            if slot.trial_id is not None:
                self._stop(slot.trial_id, StopMode.CHECKPOINT)

    def _log(self, node_id: str, node_state: NodeState, num_cores: int, node_type: str) -> None:
        self._state.log(NodeChanged(node_id=node_id, state=node_state.value, num_cores=num_cores, node_type=node_type))
        logger.info("node.%s %s %s with %d cores", node_state.value, node_id[:8], node_type, num_cores)
        apply(self._state, node_id, node_state, num_cores, node_type)


def apply(state: RunState, node_id: str, node_state: NodeState, num_cores: int, node_type: str = "") -> None:
    """Note what happened to a node; also called for the entries of a journal."""
    state.nodes[node_id] = node_state
    if node_type:
        state.node_types[node_id] = node_type
    if node_state is NodeState.LEFT:
        state.drop_devices(node_id)
    elif node_state is NodeState.JOINED and num_cores > 0:
        state.node_cores[node_id] = num_cores
        device_id = DeviceId(f"cpu:{node_id[:8]}")
        if device_id not in state.devices:
            state.set_devices((DeviceView(device_id=device_id, node_id=node_id, kind=DeviceKind.CPU, units=num_cores),))
    state.wants_decision = True


def slots_on(state: RunState, node_id: str) -> list[Slot]:
    """Open slots with a rank on that node."""
    gone = {SlotState.CLOSED, SlotState.LOST}
    return [
        slot
        for slot in state.lifecycle.slots.values()
        if slot.state not in gone
        and slot.hello is not None
        and any(device.node_id == node_id for device in slot.hello.devices)
    ]
