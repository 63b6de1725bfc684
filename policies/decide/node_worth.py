"""What nodes are worth to trials: predicted speed-ups of all of them together, for any number of nodes of each type.

`SlotWorth` is for trials that stay where they are until they end: a new node helps those that wait, and the trials of
one that goes move in with others or wait. `FleetWorth` is for trials that are placed anew: their menus say what each
makes of each size, and the best choice for a fleet is its worth. Pure; used by `policies.decide.node_wish`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.sizing import Menu, climb_sizes, total
from orchestrator.policies.learn.fit import pool
from orchestrator.policies.learn.scaling import ScalingModel, prior, solve_scaling
from orchestrator.policies.plan import DeviceId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, NodeType, Snapshot, TrialView


@dataclass(frozen=True, slots=True)
class _Make:
    """What a device of a node is."""

    device_type: str
    units: int


@dataclass(frozen=True, slots=True)
class _Host:
    """A node with the ranks on it."""

    make: _Make
    num_devices: int
    room: int
    ranks: int


class SlotWorth:
    """The worth of nodes to trials in slots."""

    def __init__(self, snapshot: Snapshot) -> None:
        trials = (*snapshot.trials, *snapshot.waiting)
        self._types = snapshot.node_types
        self._width = max((trial.start.num_workers for trial in trials), default=1)
        self._demand = sum(trial.start.num_workers for trial in trials)
        self._max_share = max((trial.limits.max_share for trial in trials), default=1.0)
        self._min_share = max((trial.limits.min_share for trial in trials), default=1.0)
        self._ranks = _ranks_by_node(snapshot)
        self._fixed = self._fixed_hosts(snapshot)
        self._speed = _Speedups(snapshot, trials)

    def of(self, counts: Mapping[str, int]) -> float:
        """See `policies.decide.node_wish.Worth`."""
        hosts, new = list(self._fixed), []
        for each in self._types:
            held = sorted((self._ranks[node_id] for node_id in each.nodes), reverse=True)
            wanted = counts[each.name]
            hosts += [self._host(each, ranks) for ranks in held[:wanted]]
            new += [self._host(each, 0)] * (wanted - len(held))
        return self._total([*hosts, *new])

    def alone(self, node_type: NodeType) -> float:
        """See `policies.decide.node_wish.Worth`."""
        return self._total([self._host(node_type, 0)])

    def _total(self, hosts: Sequence[_Host]) -> float:
        """The sum of speed-ups when the ranks that are nowhere fill what room there is, one node after the other.

        Ranks of a part of a trial count for that part, so that the nodes of a wide trial are asked for one by one.
        """
        rest = self._demand - sum(host.ranks for host in hosts)
        value = 0.0
        for host in hosts:
            ranks = host.ranks + max(0, min(rest, host.room - host.ranks))
            rest -= ranks - host.ranks
            if ranks:
                value += ranks * self._speed.of(host.make, min(self._max_share, host.num_devices / ranks))
        return value / self._width

    def _host(self, each: NodeType, ranks: int) -> _Host:
        room = min(each.num_ranks, math.floor(each.num_devices / self._min_share + 1e-9))
        return _Host(_Make(each.device_type, each.units), each.num_devices, max(room, ranks), ranks)

    def _fixed_hosts(self, snapshot: Snapshot) -> list[_Host]:
        """The nodes that are of no type, and stay."""
        known = {node_id for each in snapshot.node_types for node_id in (*each.nodes, *each.leaving)}
        by_node: dict[str, list[DeviceView]] = defaultdict(list)
        for device in snapshot.devices:
            if device.node_id not in known:
                by_node[device.node_id].append(device)
        hosts = []
        for node_id, devices in sorted(by_node.items()):
            first, ranks = devices[0], self._ranks[node_id]
            room = first.units if first.kind is DeviceKind.CPU else len(devices)
            hosts.append(_Host(_Make(first.device_type, first.units), len(devices), max(room, ranks), ranks))
        return hosts


class _Speedups:
    """How fast a typical trial is on a share of a device, over a whole one of the best."""

    def __init__(self, snapshot: Snapshot, trials: Sequence[TrialView]) -> None:
        kinds: list[NodeType | DeviceView] = [*snapshot.node_types, *snapshot.devices]
        self._speeds = {each.device_type: each.speed for each in kinds}
        self._makes = sorted({(each.device_type, each.units) for each in kinds})
        by_shape: dict[str, list[TrialView]] = defaultdict(list)
        for trial in trials:
            by_shape[trial.shape].append(trial)
        self._shapes = [(len(rows), rows[0], _model(rows)) for _, rows in sorted(by_shape.items())]
        self._best = [max(self._rate(shape, _Make(*make), 1.0) for make in self._makes) for shape in self._shapes]

    def of(self, make: _Make, share: float) -> float:
        """The mean over all trials."""
        counts = math.fsum(count for count, _, _ in self._shapes)
        sums = (
            shape[0] * self._rate(shape, make, share) / best
            for shape, best in zip(self._shapes, self._best, strict=True)
            if best > 0
        )
        return math.fsum(sums) / counts if counts else 0.0

    def _rate(self, shape: tuple[int, TrialView, ScalingModel], make: _Make, share: float) -> float:
        """Samples per second of one rank."""
        _, trial, model = shape
        tiers = [tier for tier in trial.limits.tiers if tier in model.tiers()] or list(model.tiers())
        line = model.line(tiers[0], make.device_type, self._speeds)
        if line is None:
            return 0.0
        size = trial.start.micro_batch
        return size / line.work_s(size) * model.response(share * make.units)


class FleetWorth:
    """The worth of nodes to trials that are placed anew.

    Args:
        snapshot: the world.
        fleet: the devices of `catalogue`, without those that others hold.
        menus: what each trial would make of each size there, in `unit`s of a device.
        unit: parts of a device that menus count in.
    """

    def __init__(self, snapshot: Snapshot, fleet: Fleet, menus: Sequence[Menu], unit: int) -> None:
        self._types, self._unit = snapshot.node_types, unit
        # Also a trial that is not to be moved would be, if its node went.
        self._menus = [replace(menu, idle=menu.idle if math.isfinite(menu.idle) else 0.0) for menu in menus]
        self._nothing = math.fsum(menu.idle for menu in self._menus)
        self._kinds = {name: index for index, name in enumerate(fleet.types)}
        theirs = {node_id for each in snapshot.node_types for node_id in (*each.nodes, *each.leaving)}
        present = {device.device_id for device in snapshot.devices if device.node_id not in theirs}
        self._fixed = Counter(device.device_type for device in fleet.devices if device.device_id in present)
        self._known: dict[tuple[int, ...], float] = {}

    def of(self, counts: Mapping[str, int]) -> float:
        """See `policies.decide.node_wish.Worth`."""
        devices = Counter(self._fixed)
        for each in self._types:
            devices[each.device_type] += counts[each.name] * each.num_devices
        return self._total(devices)

    def alone(self, node_type: NodeType) -> float:
        """See `policies.decide.node_wish.Worth`."""
        return self._total({node_type.device_type: node_type.num_devices})

    def _total(self, devices: Mapping[str, int]) -> float:
        capacities = tuple(devices.get(name, 0) * self._unit for name in self._kinds)
        if capacities not in self._known:
            self._known[capacities] = total(self._menus, climb_sizes(self._menus, capacities)) - self._nothing
        return self._known[capacities]


def catalogue(snapshot: Snapshot) -> tuple[DeviceView, ...]:
    """The devices of a snapshot and of all nodes there might be besides, sorted by id."""
    leaving = {node_id for each in snapshot.node_types for node_id in each.leaving}
    devices = [device for device in snapshot.devices if device.node_id not in leaving]
    for each in snapshot.node_types:
        for number in range(each.max_nodes - len(each.nodes)):
            devices += _devices(each, f"new-{each.name}-{number:04d}")
    return tuple(sorted(devices, key=lambda device: device.device_id))


def _devices(each: NodeType, node_id: str) -> Iterable[DeviceView]:
    for number in range(each.num_devices):
        yield DeviceView(
            device_id=DeviceId(f"{node_id}/{number:02d}"),
            node_id=node_id,
            kind=each.kind,
            units=each.units,
            device_type=each.device_type,
            speed=each.speed,
        )


def _model(trials: Sequence[TrialView]) -> ScalingModel:
    """The model of a shape: what its trials measured, or the assumption where none did."""
    pooled = pool([trial.fit for trial in trials])
    solved = solve_scaling(pooled.cells, pooled.known_speed)
    return solved if solved.is_measured else prior(trials[0].start.micro_batch, trials[0].limits.tiers)


def _ranks_by_node(snapshot: Snapshot) -> Counter[str]:
    nodes = {device.device_id: device.node_id for device in snapshot.devices}
    return Counter(nodes[device_id] for trial in snapshot.trials for device_id in trial.placement if device_id in nodes)
