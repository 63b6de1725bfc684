"""What follows from the cluster's nodes: who joined, who is about to leave, who is gone, who is let go. Pure.

A node's cores count as soon as it joins, before any worker group runs there. One that drains (a spot notice), or that
the plan in force does not want any more, gives its trials back with a commit; one that is gone gives them back without,
at no charge to their restarts.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.control.departures import lost, told_to_stop
from orchestrator.control.events import Event, NodeChanged, SlotChanged
from orchestrator.control.orders import StopMode
from orchestrator.control.signals import SlotToldToClose
from orchestrator.control.world import NodeState, Run, Slot, SlotState, World


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


def next_change(world: World, run: Run, present: tuple[NodeView, ...]) -> list[Event]:
    """The next difference between what is known and the nodes that are there; empty where there is none."""
    for node in present:
        known = world.nodes.get(node.node_id)
        if known is None or known.state is NodeState.LEFT:
            return [_changed(node.node_id, NodeState.JOINED, node.num_cores, node.node_type)]
        if node.is_draining and known.state is not NodeState.DRAINING:
            change = _changed(node.node_id, NodeState.DRAINING, node.num_cores, node.node_type)
            return [change, *_drained(world, run, node.node_id)]
    there = {node.node_id for node in present}
    for node_id, known in world.nodes.items():
        if node_id not in there and known.state is not NodeState.LEFT:
            for slot in world.slots_on(node_id):
                return slot_lost(world, slot, f"node {node_id[:8]} left the cluster", is_charged=False)
            return [_changed(node_id, NodeState.LEFT, 0, known.node_type)]
    return []


def next_release(world: World, run: Run) -> list[Event]:
    """The next node that the wish does not want any more, or wants again; empty where there is none."""
    for wish in run.wishes:
        ours = [node_id for node_id, node in world.nodes.items() if node.node_type == wish.node_type]
        stays = [node_id for node_id in ours if world.nodes[node_id].state is NodeState.JOINED]
        released = sorted(node_id for node_id in ours if world.nodes[node_id].state is NodeState.RELEASED)
        if released and len(stays) < wish.num_nodes:
            node = world.nodes[released[0]]
            return [_changed(released[0], NodeState.JOINED, node.num_cores, wish.node_type)]
        for node_id in released:
            if drained := _drained(world, run, node_id):
                return drained  # a slot may have been on its way there
        if len(stays) > wish.num_nodes:
            # The emptiest node costs the least to leave.
            node_id = min(stays, key=lambda node_id: (_num_trials(world, node_id), node_id))
            change = _changed(node_id, NodeState.RELEASED, world.nodes[node_id].num_cores, wish.node_type)
            return [change, *_drained(world, run, node_id)]
    return []


def order(world: World, run: Run) -> NodeOrder:
    """What the cluster shall be asked for."""
    return NodeOrder(
        wanted={wish.node_type: wish.num_nodes for wish in run.wishes},
        released=tuple(sorted(key for key, node in world.nodes.items() if node.state is NodeState.RELEASED)),
    )


def slot_lost(world: World, slot: Slot, reason: str, *, is_charged: bool = True) -> list[Event]:
    """A slot is gone with its controller or its node, and its trial goes back to the queue."""
    lost_slot = SlotChanged(slot_id=slot.slot_id, state=SlotState.LOST.value, epoch=slot.epoch)
    return [lost_slot, *orphaned(world, slot, reason, is_charged=is_charged)]


def orphaned(world: World, slot: Slot, reason: str, *, is_charged: bool = True) -> list[Event]:
    """What becomes of the trials of a slot whose processes have ended."""
    found = []
    for run_id, trial_id in slot.trials:
        run = world.runs[run_id]
        found.append(lost(run, slot, run.trials[trial_id], reason, is_charged=is_charged))
    return found


def _num_trials(world: World, node_id: str) -> int:
    return sum(len(slot.trials) for slot in world.slots_on(node_id))


def _drained(world: World, run: Run, node_id: str) -> list[Event]:
    """Its trials commit and go to the front of the queue; its slots take no more and close."""
    found: list[Event] = []
    for slot in world.slots_on(node_id):
        if not slot.is_closing:
            found.append(SlotToldToClose(slot_id=slot.slot_id))
        trial = world.trial_in(slot)
        if trial is not None and trial.stop in {StopMode.NONE, StopMode.RESIZE}:
            found += told_to_stop(run, trial, StopMode.CHECKPOINT)
    return found


def _changed(node_id: str, state: NodeState, num_cores: int, node_type: str) -> NodeChanged:
    return NodeChanged(node_id=node_id, state=state.value, num_cores=num_cores, node_type=node_type)
