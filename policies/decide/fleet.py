"""Which devices are free, and where a group of ranks goes: the bookkeeping of one decision.

Placement consolidates: a group goes to the node with the least room that holds it, or else to the emptiest nodes; a
fraction goes to the fullest device that holds it. Decides neither who gets how much nor when. Mutable, and never
outlives the `decide` that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from orchestrator.policies.plan import DeviceId
from orchestrator.policies.snapshot import DeviceView

_EPSILON = 1e-9

Seats = tuple[int, ...]
"""Indices of devices, one per rank."""


class Fleet:
    """Free capacity per device and node.

    Attributes:
        devices: the devices, sorted by node and id; their positions are the indices in `Seats`.
        node_of: the node index of every device.
        types: device types, sorted; `type_of` has the index of each device's.
    """

    def __init__(self, devices: Iterable[DeviceView]) -> None:
        self.devices = tuple(sorted(devices, key=lambda device: (device.node_id, device.device_id)))
        self.index = {device.device_id: index for index, device in enumerate(self.devices)}
        nodes = sorted({device.node_id for device in self.devices})
        node_index = {node_id: index for index, node_id in enumerate(nodes)}
        self.types = tuple(sorted({device.device_type for device in self.devices}))
        type_index = {name: index for index, name in enumerate(self.types)}
        self.node_of = [node_index[device.node_id] for device in self.devices]
        self.type_of = [type_index[device.device_type] for device in self.devices]
        self._free: npt.NDArray[np.float64] = np.ones(len(self.devices))
        self._types: npt.NDArray[np.int64] = np.array(self.type_of, dtype=np.int64)
        # One row per type: a node may hold devices of several types.
        self._whole: npt.NDArray[np.int64] = np.zeros((len(self.types), len(nodes)), dtype=np.int64)
        self._idle: list[list[set[int]]] = [[set() for _ in nodes] for _ in self.types]
        for seat, (node, kind) in enumerate(zip(self.node_of, self.type_of, strict=True)):
            self._whole[kind, node] += 1
            self._idle[kind][node].add(seat)
        sizes = self._whole.max(axis=1, initial=0)
        self.node_sizes = tuple(int(size) for size in sizes)

    def capacity(self, kind: int) -> int:
        """Devices of a type, held or not."""
        return self.type_of.count(kind)

    def num_idle(self, kind: int) -> int:
        """Devices of a type that nobody holds any part of."""
        return int(self._whole[kind].sum())

    def free(self, seat: int) -> float:
        """What is left of a device."""
        return float(self._free[seat])

    def seats(self, placement: Iterable[DeviceId]) -> Seats | None:
        """The indices of a placement; None where a device of it is gone."""
        found = tuple(self.index.get(device_id, -1) for device_id in placement)
        return None if -1 in found else found

    def placement(self, seats: Seats) -> tuple[DeviceId, ...]:
        """The device ids of seats."""
        return tuple(self.devices[seat].device_id for seat in seats)

    def num_nodes(self, seats: Seats) -> int:
        """Nodes that a group spans."""
        return len({self.node_of[seat] for seat in seats})

    def holds(self, seats: Seats, share: float) -> bool:
        """Whether that share of every one of these devices is free."""
        return all(self._free[seat] >= share - _EPSILON for seat in seats)

    def take(self, seats: Seats, share: float) -> None:
        """Grant a share of these devices."""
        for seat in seats:
            self._set(seat, float(self._free[seat]) - share)

    def give_back(self, seats: Seats, share: float) -> None:
        """Undo `take`."""
        for seat in seats:
            self._set(seat, float(self._free[seat]) + share)

    def find(self, kind: int, workers: int, share: float = 1.0, *, avoid: frozenset[int] = frozenset()) -> Seats | None:
        """Seats for a group on one type of device; None where there is no room.

        Args:
            kind: index of the type.
            workers: ranks.
            share: of each device; below 1 only one rank is placed.
            avoid: nodes that a group which spans several must not touch.
        """
        if share < 1 - _EPSILON:
            return self._find_fraction(kind, share) if workers == 1 else None
        whole = self._whole[kind]
        fitting = np.where(whole >= workers, whole, np.iinfo(np.int64).max)
        node = int(fitting.argmin()) if fitting.size else 0
        if fitting.size and whole[node] >= workers:
            return tuple(sorted(self._idle[kind][node])[:workers])
        return self._find_spread(kind, workers, avoid)

    def _find_fraction(self, kind: int, share: float) -> Seats | None:
        mask = (self._types == kind) & (self._free >= share - _EPSILON)
        if not mask.any():
            return None
        return (int(np.where(mask, self._free, np.inf).argmin()),)

    def _find_spread(self, kind: int, workers: int, avoid: frozenset[int]) -> Seats | None:
        """The emptiest nodes, and for the rest the one with the least room that holds it."""
        whole = self._whole[kind]
        if int(whole.sum()) < workers:
            return None
        seats: list[int] = []
        order = np.argsort(-whole, kind="stable")
        nodes = [int(node) for node in order if whole[node] > 0 and int(node) not in avoid]
        left = workers
        for position, node in enumerate(nodes):
            if left <= whole[node]:
                last = min((n for n in nodes[position:] if whole[n] >= left), key=lambda n: (int(whole[n]), n))
                seats += sorted(self._idle[kind][last])[:left]
                return tuple(seats)
            seats += sorted(self._idle[kind][node])
            left -= int(whole[node])
        return None

    def _set(self, seat: int, free: float) -> None:
        kind, node = self.type_of[seat], self.node_of[seat]
        idle = self._idle[kind][node]
        free = 1.0 if free > 1 - _EPSILON else max(0.0, free)
        self._free[seat] = free
        if free == 1.0 and seat not in idle:
            idle.add(seat)
            self._whole[kind, node] += 1
        elif free < 1.0 and seat in idle:
            idle.remove(seat)
            self._whole[kind, node] -= 1


def in_rank_order(old: Sequence[int], new: Seats) -> Seats:
    """The new seats with ranks that stay first and in their order, so that a small change moves few of them."""
    kept = [seat for seat in old if seat in new]
    return (*kept, *(seat for seat in new if seat not in kept))
