"""A trial's last good state in memory: parameters, optimizer state and position, to go back to after a hard fault.

Copies of this rank's shards, on the host where the model is on a GPU. Taken before a trial enters a cheaper tier and
after probes that found it good; a fault of the tier then costs the steps since, not the trial. Checkpoints on disk are
another matter (`train.checkpoint`). Called by `watch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.train.fsdp import local_part


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Tensors in the order of `_tensors`, and what else the owner wants back."""

    tensors: tuple[Tensor, ...]
    extra: dict[str, Any]


def capture(model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> MemoryState:
    """A copy of everything that training changes."""
    copies = tuple(_copy(tensor) for tensor in _tensors(model, optimizer))
    return MemoryState(tensors=copies, extra=extra)


def restore(state: MemoryState, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the copies back in place; optimizer state that did not exist yet becomes zero, its value at the start."""
    live = list(_tensors(model, optimizer))
    with torch.no_grad():
        for number, tensor in enumerate(live):
            if number < len(state.tensors):
                tensor.copy_(state.tensors[number])
            else:
                tensor.zero_()
    return state.extra


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Parameters, buffers and optimizer state as far as this rank has them, always in the same order."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield local_part(tensor.detach())
    for group in optimizer.param_groups:
        for param in group["params"]:
            for _, value in sorted(optimizer.state.get(param, {}).items()):
                if isinstance(value, Tensor):
                    yield local_part(value.detach())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)
