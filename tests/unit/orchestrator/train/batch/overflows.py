"""Jobs that run out of memory at a chosen step and place, as a real one would: with torch's own exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.mlp import MlpJob

PLACES = ("forward", "backward", "optimizer", "torn")


def overflow() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        overflow()
        return grad


class OverflowingJob(MlpJob):
    """Runs out of memory in its n-th forward pass (or update), while a micro-batch is larger than `fits`.

    `is_done` is called with True once it has fired, so that a test can see that it did.
    """

    def __init__(self, place: str, at: int, fits: int = 4, times: int = 1, **params: Any) -> None:
        super().__init__(**params)
        self._place, self._at, self._fits, self._times = place, at, fits, times
        self._num_forwards = self._num_updates = 0
        self._micro_batch = 0
        self.num_fired = 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        self._micro_batch = len(batch[1])
        self._num_forwards += 1
        fires = self._fires(self._num_forwards)
        if fires and self._place == "forward":
            self.num_fired += 1
            overflow()
        terms = super().loss(model, batch)
        if fires and self._place == "backward":
            self.num_fired += 1
            last: Tensor = _FailsInBackward.apply(terms.loss_sum)  # type: ignore[no-untyped-call]
            return LossTerms(loss_sum=last, num_elements=terms.num_elements)
        return terms

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = optimizer.step

        def failing_step(closure: Callable[[], float] | None = None) -> Any:
            self._num_updates += 1
            fires = self._place in {"optimizer", "torn"} and self._fires(self._num_updates)
            if fires and self._place == "torn":
                with torch.no_grad():
                    first = optimizer.param_groups[0]["params"][0]
                    first.add_(1.0)  # the update was half done
            if fires:
                self.num_fired += 1
                overflow()
            return step(closure) if closure is not None else step()

        optimizer.step = failing_step  # type: ignore[method-assign]
        return optimizer

    def _fires(self, number: int) -> bool:
        return number >= self._at and self.num_fired < self._times and self._micro_batch > self._fits
