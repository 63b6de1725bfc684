"""Small copies between host and device that wait for neither: batches in, losses out, through rings of pinned buffers.

On a CPU the copies are done at once. Knows no step; called by `captured.CapturedStep`.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Readout:
    """A few floats per step, oldest first: `push` starts a copy behind the step, `pop` waits for the oldest one.

    Args:
        width: floats per step.
        depth: steps that may be on their way.
        device: where they come from.
    """

    def __init__(self, width: int, depth: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._free = deque(torch.zeros(width, pin_memory=self._is_cuda) for _ in range(depth))
        self._events = deque(_event() for _ in range(depth)) if self._is_cuda else None
        self._flying: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._flying)

    def push(self, values: Tensor) -> None:
        """Start to bring `values`, as the work launched so far leaves them."""
        buffer = self._free.popleft()
        buffer.copy_(values, non_blocking=True)
        event = None
        if self._events is not None:
            event = self._events.popleft()
            event.record()
        self._flying.append((buffer, event))

    def pop(self) -> list[float]:
        """The oldest values; waits until they are there."""
        buffer, event = self._flying.popleft()
        if event is not None:
            event.synchronize()
            assert self._events is not None
            self._events.append(event)
        self._free.append(buffer)
        values: list[float] = buffer.tolist()
        return values


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event


class Staging:
    """Brings batches of one shape to the device, behind the work launched so far.

    Args:
        like: a batch of that shape, on the host.
        depth: batches that may be on their way; the next one waits for the oldest.
        device: where they go.
    """

    def __init__(self, like: tuple[Tensor, ...], depth: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._buffers = [tuple(torch.empty_like(part, pin_memory=is_cuda) for part in like) for _ in range(depth)]
        self._events = [_event() for _ in range(depth)] if is_cuda else None
        self._count = 0

    def bring(self, batch: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> None:
        """Copy `batch` into `target` on the device."""
        index = self._count % len(self._buffers)
        event = None if self._events is None else self._events[index]
        if event is not None and self._count >= len(self._buffers):
            event.synchronize()
        self._count += 1
        for held, static, part in zip(self._buffers[index], target, batch, strict=True):
            held.copy_(part)
            static.copy_(held, non_blocking=True)
        if event is not None:
            event.record()
