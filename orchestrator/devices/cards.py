"""Which GPU of its node each rank of a worker group computes on: one of its own. No Ray, no torch.

Ray fills one GPU before it begins another, so two ranks that reserve half a GPU each are given the same one, and NCCL
lets no two ranks of a trial share a GPU. So ranks are put on other GPUs than Ray says, and Ray only keeps the accounts.
Called by `devices.ray_cards` while a worker group starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where Ray has put a rank.

    Attributes:
        node_id: its node.
        assigned: the GPU that Ray says, as CUDA_VISIBLE_DEVICES names it.
        cards: all GPUs of the node, named alike.
    """

    node_id: str
    assigned: str
    cards: tuple[str, ...]


def spread(seats: Sequence[Seat]) -> tuple[str, ...]:
    """A GPU for each rank: the assigned one, or the next on that node that no rank of the group has.

    Groups that Ray has put on different GPUs begin at different ones, so all are used alike. Where a node has fewer
    GPUs than ranks, ranks share as Ray has it, and the slot refuses to serve.
    """
    own: dict[int, str] = {}
    taken: set[tuple[str, str]] = set()
    for rank, seat in enumerate(seats):
        if (seat.node_id, seat.assigned) not in taken:
            own[rank] = seat.assigned
            taken.add((seat.node_id, seat.assigned))
    for rank, seat in enumerate(seats):
        if rank in own:
            continue
        free = [card for card in _from(seat) if (seat.node_id, card) not in taken]
        own[rank] = free[0] if free else seat.assigned
        taken.add((seat.node_id, own[rank]))
    return tuple(own[rank] for rank in range(len(seats)))


def visible(seats: Sequence[Seat]) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES of each rank: its own GPU first, so that it is cuda:0 in every thread of the process.

    Behind it come those of the other ranks of the node, which NCCL reaches directly, and the assigned one, which Ray
    Train looks for.
    """
    own = spread(seats)
    lists = []
    for rank, seat in enumerate(seats):
        beside = {card for other, card in zip(seats, own, strict=True) if other.node_id == seat.node_id}
        lists.append(",".join((own[rank], *sorted((beside | {seat.assigned}) - {own[rank]}))))
    return tuple(lists)


def _from(seat: Seat) -> tuple[str, ...]:
    """The GPUs of the node, beginning with the assigned one."""
    first = seat.cards.index(seat.assigned) if seat.assigned in seat.cards else 0
    return seat.cards[first:] + seat.cards[:first]
