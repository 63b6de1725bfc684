"""The instant between two steps: all ranks learn of a new order before the same step, and nobody waits for it.

One rank: an integer is compared. Several: at each boundary every rank posts an asynchronous broadcast of rank 0's order
version over a side group and reads the one posted a step earlier, which has arrived by then. When the version changed,
the order itself follows in one blocking broadcast; all ranks are at the same boundary anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from orchestrator.control.orders import SlotOrder
from orchestrator.train.link import Link

_HEARTBEAT_S = 5.0


class Boundary:
    """Agreement of the ranks of one worker group on the newest order. Lives as long as the group does."""

    def __init__(self, link: Link, rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        self._link, self._rank, self._world_size, self._group = link, rank, world_size, group
        self._seen = 0
        self._posted: tuple[dist.Work, torch.Tensor, SlotOrder | None, int] | None = None

    @property
    def has_news(self) -> bool:
        """Whether there is an order that this rank has not read."""
        return self._link.version != self._seen

    def cross(self) -> SlotOrder | None:
        """Called by every rank between two steps: the new order to follow from here on, or None."""
        if self._world_size == 1:
            version = self._link.version
            if version == self._seen:
                return None
            self._seen = version
            return self._link.order()
        order = self._collect()
        self._post()
        return order

    def wait(self, timeout_s: float = _HEARTBEAT_S) -> SlotOrder | None:
        """Called by every rank when there is nothing to do: the next order, or None after the timeout.

        Rank 0 waits outside of any collective; the others wait for its word, which comes at least once a heartbeat.
        """
        if self._world_size == 1:
            self._link.wait(self._seen, timeout_s)
            return self.cross()
        order = self._collect()
        if order is not None:
            return order
        news: list[Any] = [None, self._seen]
        if self._rank == 0:
            self._link.wait(self._seen, min(timeout_s, _HEARTBEAT_S))
            version = self._link.version
            if version != self._seen:
                news = [self._link.order(), version]
        dist.broadcast_object_list(news, src=0, group=self._group)
        self._seen = news[1]
        result: SlotOrder | None = news[0]
        return result

    def drain(self) -> None:
        """Finish what is posted; called by every rank before the group is used for something else."""
        if self._posted is not None:
            self._posted[0].wait()
            self._posted = None

    def regroup(self, group: dist.ProcessGroup | None) -> None:
        """The ranks have new groups; what was posted over the old one is void, and every rank reads its order anew."""
        self._group, self._posted, self._seen = group, None, -1

    def _post(self) -> None:
        """Start telling the others rank 0's order version; it will be read at the next boundary."""
        order, version = None, self._seen
        if self._rank == 0:
            version = self._link.version
            if version != self._seen:
                order = self._link.order()
        tensor = torch.tensor([version], dtype=torch.int64)
        work = dist.broadcast(tensor, src=0, group=self._group, async_op=True)
        self._posted = (work, tensor, order, version)

    def _collect(self) -> SlotOrder | None:
        """Read what was posted at the boundary before this one."""
        if self._posted is None:
            return None
        work, tensor, order, _ = self._posted
        self._posted = None
        work.wait()
        version = int(tensor.item())
        if version == self._seen:
            return None
        news: list[Any] = [order]
        dist.broadcast_object_list(news, src=0, group=self._group)
        self._seen = version
        result: SlotOrder = news[0]
        return result
