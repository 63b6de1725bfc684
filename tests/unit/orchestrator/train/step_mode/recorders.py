"""A recorder for machines without a GPU: it replays by calling again, and leaves the trial as it found it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from orchestrator.train.batch.noise import RecordedPair


class CallAgain:
    """Follows a CUDA graph in what can be seen: recording executes nothing, a replay writes where the recording did."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.keeps_work = True
        self.place = 0
        self.memory_bytes = 0
        self.num_recorded = 0
        self.refuses: Exception | None = None
        self.borrowed: list[weakref.ref[torch.Tensor]] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.refuses is not None:
            raise self.refuses
        self.num_recorded += 1
        self.borrowed += [weakref.ref(tensor) for tensor in _tensors_of(work)]
        used = [*self._state(), *_kept_by(work)]
        before = [tensor.clone() for tensor in used]
        rng = torch.get_rng_state()
        work()
        torch.set_rng_state(rng)
        for tensor, value in zip(used, before, strict=True):
            tensor.copy_(value)
        recorded = {param: param.grad for param in self._model.parameters()}

        return self._replay_of(work, recorded) if self.keeps_work else _nothing

    def rehearse(self, work: Callable[[], None], *, may_wait: bool = False) -> None:
        rng = torch.get_rng_state()
        work()
        torch.set_rng_state(rng)

    @staticmethod
    def _replay_of(work: Callable[[], None], recorded: dict[nn.Parameter, Any]) -> Callable[[], None]:
        def replay() -> None:
            bound = {param: param.grad for param in recorded}
            for param, grad in recorded.items():
                param.grad = grad
            work()
            for param, grad in recorded.items():
                if grad is not None and param.grad is not grad:
                    assert param.grad is not None
                    grad.copy_(param.grad)
            for param, grad in bound.items():  # a graph runs no Python: what `.grad` was it stays
                param.grad = grad

        return replay

    def _state(self) -> list[torch.Tensor]:
        tensors: list[Any] = [param.detach() for param in self._model.parameters()]
        for values in self._optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
        return tensors


def _kept_by(work: Callable[[], None]) -> list[torch.Tensor]:
    """What the noise of a pair of steps keeps between them."""
    owner = getattr(getattr(work, "func", work), "__self__", None)
    return list(owner._held) if isinstance(owner, RecordedPair) else []


def _nothing() -> None:
    """A graph holds no reference to what it was recorded from."""


def _tensors_of(work: Callable[[], None]) -> Iterator[torch.Tensor]:
    """Tensors that a function was given with it: a graph will use their memory, whether or not anybody holds them."""
    cells = getattr(work, "__closure__", None) or ()
    given = [cell.cell_contents for cell in cells] + [*getattr(work, "args", ())]
    for value in given:
        yield from (
            part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, torch.Tensor)
        )
