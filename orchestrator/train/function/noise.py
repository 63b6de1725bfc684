"""The gradient noise of a user's function, from the gradients of two successive steps.

The orchestrator cannot cut a function's batch in halves, so it compares the gradients of one step with those of the
next, two of `PERIOD` steps. Weights move in between, which adds to the noise what one step changes of the gradient; see
`batch.noise.RecordedPair`. Gradients are read where the optimizer finds them: behind the function's own clipping, which
scales both terms alike. Called by the driver in front of each step of the first optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.train.batch.noise import NoiseEstimate, RecordedPair

FIRST, PERIOD = 20, 32
"""The first step whose gradients are kept, and steps from one pair to the next."""
MAX_BYTES = 1 << 30
"""Gradients larger than this are not copied: the copy is memory that the function does not know of."""


class StepPairs:
    """Takes the gradients of an optimizer in front of its steps; every pair of them is one estimate."""

    def __init__(self) -> None:
        self._pair: RecordedPair | None = None
        self._params: list[Tensor] = []
        self._held_at = -1
        self._found: Tensor | None = None
        self._is_off = False

    def before(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Look at the gradients of the step that is about to be made."""
        place = (step - FIRST) % PERIOD
        if self._is_off or step < FIRST or place > 1:
            return
        if self._pair is None and not self._open(optimizer):
            return
        assert self._pair is not None
        if place == 0:
            self._pair.make_room()
            self._pair.hold()
            self._held_at = step
        elif self._held_at == step - 1:
            self._found = torch.zeros(2, dtype=torch.float64, device=self._params[0].device)
            self._pair.compare(self._found)
            self._pair.drop()

    def take(self, num_samples: int) -> NoiseEstimate | None:
        """The estimate of the step that was just made, of so many samples; None where it ended no pair."""
        found, self._found = self._found, None
        if found is None:
            return None
        grad_sq, difference_sq = found.tolist()
        return RecordedPair.estimate((grad_sq, difference_sq), num_samples)

    def _open(self, optimizer: torch.optim.Optimizer) -> bool:
        """Begin with the parameters of an optimizer; False, for good, where their gradients cannot be compared."""
        self._params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        is_plain = bool(self._params) and all(
            type(p.data) is Tensor and p.layout is torch.strided and p.device == self._params[0].device
            for p in self._params
        )
        if not is_plain or sum(p.numel() * p.element_size() for p in self._params) > MAX_BYTES:
            self._is_off = True
            return False
        self._pair = RecordedPair(self._params, optimizer)
        return True
