"""A paused trial's tensors moved to host memory and back, in place: every reference to them stays valid.

Only storages move; parameters and optimizer state keep their identity, so optimizer and model notice nothing. What was
captured in a CUDA graph holds addresses and must be captured again. Called by the stepper at a boundary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


class Offload:
    """The state of one trial, on its device or in host memory.

    Args:
        model, optimizer: whose tensors move.
        from_host: move them even if they are in host memory; for tests.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, from_host: bool = False) -> None:
        self._model, self._optimizer, self._from_host = model, optimizer, from_host
        self._held: list[tuple[torch.UntypedStorage, Tensor]] = []

    @property
    def is_away(self) -> bool:
        """Whether the state is in host memory."""
        return bool(self._held)

    def away(self) -> int:
        """Move everything to host memory; returns the bytes given back. Nothing may be running on the device.

        On a host there is nothing to give back, and parts of several ranks stay where they are.
        """
        tensors = list(self._tensors())
        if self._held or not self._is_worth_it(tensors):
            return 0
        for param in self._model.parameters():
            param.grad = None
        moved = 0
        for storage in self._storages():
            size = storage.nbytes()
            host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            host.copy_(_bytes_of(storage))
            self._held.append((storage, host))
            moved += size
        for storage, _ in self._held:
            storage.resize_(0)
        if tensors and tensors[0].device.type == "cuda":
            torch.cuda.empty_cache()
        logger.info("paused: %.1f MB moved to host memory", moved / 1e6)
        return moved

    def back(self) -> None:
        """Move everything back to where it was; harmless when it is there.

        Raises:
            torch.OutOfMemoryError: there is no room; what did not fit stays in host memory and can be tried again.
        """
        while self._held:
            storage, host = self._held[-1]
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host)
            self._held.pop()

    def _is_worth_it(self, tensors: list[Tensor]) -> bool:
        is_plain = not any(isinstance(tensor, DTensor) for tensor in tensors)
        return is_plain and (self._from_host or any(tensor.device.type == "cuda" for tensor in tensors))

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Every storage once, though tensors may share one."""
        seen: set[int] = set()
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _tensors(self) -> Iterator[Tensor]:
        yield from (param.detach() for param in self._model.parameters())
        yield from self._model.buffers()
        for values in self._optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a flat tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
