"""Nodes that can be asked for, and trials that wait for them, as a policy sees them. No Ray.

What a run file leaves open of a type (how a device's shares are cut, what model it is) is taken from a node of it that
is there. Called when a snapshot is made.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from orchestrator.control.world import NodeState, Run, Trial, World
from orchestrator.policies.learn.fit import NOTHING_FITTED, inherit
from orchestrator.policies.snapshot import DeviceView, NodeType, TrialView


def node_type_views(world: World, run: Run) -> tuple[NodeType, ...]:
    """Every type of the run file, with the nodes of it that are there."""
    ids: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for node_id, node in world.nodes.items():
        if node.node_type and node.state is not NodeState.LEFT:
            ids[node.node_type, node.state is NodeState.JOINED].append(node_id)
    found = []
    for each in run.spec.node_types:
        stays, leaving = sorted(ids[each.name, True]), sorted(ids[each.name, False])
        seen = replace(each, nodes=tuple(stays), leaving=tuple(leaving))
        device = _device_of(world, (*stays, *leaving), each)
        if device is not None:
            seen = replace(seen, units=device.units, device_type=device.device_type)
        found.append(seen)
    return tuple(found)


def waiting_views(run: Run) -> tuple[TrialView, ...]:
    """The trials that would run if there were room, next first; none where no node can be asked for."""
    spec = run.spec
    if not spec.node_types:
        return ()
    running = run.running()
    known = {spec.shape(trial.params) for trial in running}
    room = max(0, spec.max_running - len(running))
    return tuple(_waiting(run, run.trials[trial_id], known) for trial_id in run.queue[:room])


def _waiting(run: Run, trial: Trial, known: set[str]) -> TrialView:
    """A trial in the queue; what its shape is known for is with those of it that run."""
    spec, shape = run.spec, run.spec.shape(trial.params)
    fit = NOTHING_FITTED if shape in known else inherit(run.shape_fits.get(shape, NOTHING_FITTED))
    return TrialView(
        trial_id=trial.trial_id,
        shape=shape,
        start=spec.start,
        limits=spec.limits,
        placement=(),
        weight=run.terms_of(trial).weight,
        step=trial.step,
        num_samples=trial.num_samples,
        target_samples=spec.target_samples,
        throughput_per_s=None,
        loss=None,
        is_stale=False,
        fit=fit,
        override=None,
        changed_at_s=0.0,
        began_at_s=0.0,
    )


def _device_of(world: World, node_ids: tuple[str, ...], each: NodeType) -> DeviceView | None:
    devices = (device for _, device in sorted(world.devices.items()))
    return next((one for one in devices if one.node_id in node_ids and one.kind is each.kind), None)
