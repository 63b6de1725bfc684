"""The gradient noise of a user's function, from gradients that it computes anyway.

Where it accumulates, both halves of the micro-batches of a step are compared, at the same weights. Where a step is one
batch, which the orchestrator cannot cut, the gradients of one step are compared with those of the next; weights move in
between, which adds to the noise what one step changes of the gradient, see `batch.noise.RecordedPair`. So many steps
are measured as in declared trainings: one or two of 4 until the noise scale is known, then of 32 and later of 64.

Halves are read as soon as they are computed, pairs where the optimizer finds them: behind the function's own clipping,
which scales both terms alike. Called by the driver behind each backward pass, and in front of each step of the first
optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.train.batch.meter import (
    EARLY_DRAWS,
    EARLY_PERIOD_STEPS,
    ENOUGH_DRAWS,
    FIRST_STEP,
    PERIOD_STEPS,
    QUIET_PERIOD_STEPS,
)
from orchestrator.train.batch.noise import HalfNoise, NoiseEstimate, RecordedPair, weights_of

MAX_BYTES = 1 << 30
"""Gradients larger than this are not copied: the copy is memory that the function does not know of."""


class FunctionNoise:
    """Looks at the gradients of an optimizer: two halves of a step, or two steps, are one estimate."""

    def __init__(self) -> None:
        self._pair: RecordedPair | None = None
        self._halves, self._half_at = HalfNoise(), -1
        self._estimate: NoiseEstimate | None = None
        self._params: list[Tensor] = []
        self._next, self._held_at = FIRST_STEP, -1
        self._held_samples = 0
        self._num_draws = 0
        self._found: Tensor | None = None
        self._is_off = False

    def turned(self) -> None:
        """The dials changed: gradients that were kept are not comparable with those to come."""
        self._held_at = self._half_at = -1
        self._halves.reset()

    def behind(self, optimizer: torch.optim.Optimizer, step: int, number: int, parts: tuple[int, int]) -> None:
        """Look at the gradients behind backward pass `number` of a step.

        Args:
            optimizer: the one that will make the step.
            step: its number.
            number: of the backward pass, from 1.
            parts: micro-batches of a step, and samples of each.
        """
        num_parts, size = parts
        half = num_parts // 2
        is_first, is_last = number == half, number == num_parts and self._half_at == step
        if self._is_off or step < self._next or not (is_first or is_last):
            return
        if not self._params and not self._open(optimizer):
            return
        grads = [param.grad for param in self._params if param.grad is not None]
        if is_first:
            self._halves.hold(grads, half * size)
            self._half_at = step
            return
        self._next, self._half_at = step + self._period, -1
        weights = weights_of(optimizer, self._params)
        if weights is None:
            self._halves.reset()
            return
        self._estimate = self._halves.observe(grads, num_parts * size, weights=weights)
        self._num_draws += self._estimate is not None

    def before(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Look at the gradients of the step that is about to be made of one batch."""
        is_held = 0 <= self._held_at == step - 1
        if self._is_off or not (is_held or step >= self._next):
            return
        if self._pair is None and not self._open(optimizer):
            return
        assert self._pair is not None
        if is_held:
            self._found = torch.zeros(2, dtype=torch.float64, device=self._params[0].device)
            self._pair.compare(self._found)
            self._pair.drop()
        else:
            self._pair.make_room()
            self._pair.hold()
            self._held_at, self._next = step, step + self._period

    def take(self, num_samples: int) -> NoiseEstimate | None:
        """The estimate of the step that was just made, of so many samples; None where it ended no pair and no half.

        Steps of different sizes, such as the last of an epoch, are no pair.
        """
        found, self._found = self._found, None
        held_samples, self._held_samples = self._held_samples, num_samples
        estimate, self._estimate = self._estimate, None
        if found is None or held_samples != num_samples:
            return estimate
        self._num_draws += 1
        grad_sq, difference_sq = found.tolist()
        return RecordedPair.estimate((grad_sq, difference_sq), num_samples)

    @property
    def _period(self) -> int:
        """Steps from one pair to the next."""
        if self._num_draws < EARLY_DRAWS:
            return EARLY_PERIOD_STEPS
        return PERIOD_STEPS if self._num_draws < ENOUGH_DRAWS else QUIET_PERIOD_STEPS

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
