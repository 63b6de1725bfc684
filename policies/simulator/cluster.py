"""The devices of a simulated world: nodes of some type, and what becomes of them (they come, go, change their price).

`parse_cluster("16x4")` is what the command line takes. Knows nothing of jobs. Read by the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.policies.plan import DeviceId
from orchestrator.policies.simulator.rows import TableError, read_rows
from orchestrator.policies.snapshot import DeviceKind, DeviceView

_GROUP = re.compile(r"(\d{1,6})x(\d{1,4})(?::([a-z0-9_-]{1,24})(?:@([0-9.]{1,12}))?(?:\$([0-9.]{1,12}))?)?")
_MAX_DEVICES = 200_000
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A host with equal devices.

    Attributes:
        node_id: its name.
        num_devices: how many it has.
        device_type: their type; may be empty.
        speed: what policies are told about the type's speed relative to others until it was measured.
        price_per_hour: of one device while a trial holds it.
        devices: its devices as they were recorded; empty for `num_devices` GPUs made up from the rest.
    """

    node_id: str
    num_devices: int
    device_type: str = ""
    speed: float = 1.0
    price_per_hour: float = 0.0
    devices: tuple[DeviceView, ...] = ()

    def views(self, units: int) -> tuple[DeviceView, ...]:
        """Its devices as a policy sees them."""
        return self.devices or tuple(
            DeviceView(
                device_id=DeviceId(f"{self.node_id}/gpu{index:02d}"),
                node_id=self.node_id,
                kind=DeviceKind.CUDA,
                units=units,
                device_type=self.device_type,
                speed=self.speed,
                price_per_s=self.price_per_hour / _SECONDS_PER_HOUR,
            )
            for index in range(self.num_devices)
        )


class NodeChange(StrEnum):
    """What happens to a node."""

    JOINS = "joins"
    LEAVES = "leaves"
    PRICE = "price"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEvent:
    """At `time_s` a node of the cluster joins, leaves, or gets another price per device and hour."""

    time_s: float
    node_id: str
    change: NodeChange
    price_per_hour: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All nodes there will ever be, and the events. A node that has a `joins` event is absent before the first one."""

    nodes: tuple[Node, ...]
    events: tuple[NodeEvent, ...] = ()

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return sum(node.num_devices for node in self.nodes)

    @property
    def devices_per_node(self) -> int:
        """Devices of the largest node."""
        return max(node.num_devices for node in self.nodes)

    def present_at_start(self) -> Iterator[Node]:
        """The nodes that are there from the beginning."""
        first: dict[str, NodeChange] = {}
        for event in self.events:
            if event.change is not NodeChange.PRICE:
                first.setdefault(event.node_id, event.change)
        return (node for node in self.nodes if first.get(node.node_id) is not NodeChange.JOINS)


def parse_cluster(text: str) -> Cluster:
    """A cluster from `NODESxDEVICES`, several kinds joined by '+': `16x4`, `8x4:t4+2x8:a100@3.1$2.5`.

    After the type may follow '@' and its speed relative to the others, and '$' and its price per device and hour.

    Raises:
        ValueError: it is not of that form, or has no device.

    >>> [node.node_id for node in parse_cluster("1x4:t4+1x8:a100").nodes]
    ['node0000-t4', 'node0001-a100']
    """
    nodes: list[Node] = []
    for part in text.split("+"):
        found = _GROUP.fullmatch(part.strip())
        if found is None:
            raise ValueError(
                f"cluster {text[:80]!a}: {part[:40]!a} is not a group of nodes; allowed: NODESxDEVICES, "
                "with an optional :type@speed$price, groups joined by '+', such as 16x4 or 8x4:t4+2x8:a100@3.1$2.5"
            )
        num_nodes, num_devices = int(found[1]), int(found[2])
        try:
            speed, price = float(found[4] or 1), float(found[5] or 0)
        except ValueError:
            raise ValueError(f"cluster {text[:80]!a}: {part[:40]!a}: speed and price must be numbers") from None
        if not (num_nodes and num_devices and speed > 0):
            raise ValueError(f"cluster {text[:80]!a}: {part[:40]!a}; allowed: at least one node, device, speed > 0")
        for _ in range(num_nodes):
            name = f"node{len(nodes):04d}" + (f"-{found[3]}" if found[3] else "")
            nodes.append(
                Node(
                    node_id=name,
                    num_devices=num_devices,
                    device_type=found[3] or "",
                    speed=speed,
                    price_per_hour=price,
                )
            )
    cluster = Cluster(nodes=tuple(nodes))
    if cluster.num_devices > _MAX_DEVICES:
        raise ValueError(f"cluster {text[:80]!a} has {cluster.num_devices} devices; allowed: {_MAX_DEVICES}")
    return cluster


def read_events(lines: Iterable[str], source: str, cluster: Cluster) -> tuple[NodeEvent, ...]:
    """Events from a CSV `time,node,change,price`; change is joins, leaves or price.

    Raises:
        TableError: something in it cannot be used; the message names line, column, value and what is allowed.
    """
    names = {node.node_id for node in cluster.nodes}
    events = []
    for row in read_rows(lines, source, ("time", "node", "change"), ("price",)):
        node_id = row.text("node")
        if node_id not in names:
            raise row.wrong("node", f"a node of the cluster, {min(names)} to {max(names)}")
        change = NodeChange(row.one_of("change", [each.value for each in NodeChange]))
        price = row.number("price") if change is NodeChange.PRICE else 0.0
        events.append(NodeEvent(time_s=row.seconds("time"), node_id=node_id, change=change, price_per_hour=price))
    if not events:
        raise TableError(f"{source}: there is no event in it; allowed: at least one line below the head")
    return tuple(sorted(events, key=lambda event: (event.time_s, event.node_id)))
