"""The gradient noise of every member of a bundle, from two of its steps in a row.

What `batch.noise.RecordedPair` does for a trial alone, on rows: some keep the gradient of a step, some compare theirs
with the one that they kept, with Adam's preconditioner where there is one. Which row does what at which step is read
from the device, since members are at different steps. Called by the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from orchestrator.train.batch.meter import PairPart
from orchestrator.train.bundle.stacked import Stacked


class Pairs:
    """Keeps and compares gradients of rows.

    Args:
        stacked: with the second moments, where the optimizer has them.
        grads: of a step, (K, N), sums over its losses.
        optimizers: those of the members.
        num_steps: most steps in a row.

    Attributes:
        weight: what makes means of the sums.
        found: <g1, g2> and |g1 - g2|^2 of each row by step, (steps, K, 2).
    """

    def __init__(
        self, stacked: Stacked, grads: Tensor, optimizers: Sequence[torch.optim.Optimizer], num_steps: int
    ) -> None:
        num_rows, device = len(grads), grads.device
        self._stacked, self._grads = stacked, grads
        first = [each.param_groups[0] for each in optimizers]
        self._numbers: Tensor | None = None
        if "betas" in first[0]:
            rows = [(float(group["betas"][1]), float(group["eps"])) for group in first]
            self._numbers = torch.tensor(rows + [rows[0]] * (num_rows - len(rows)), device=device)
        self._held: Tensor | None = None
        self._holds = torch.zeros(num_steps, num_rows, dtype=torch.bool, device=device)
        self.found = torch.zeros(num_steps, num_rows, 2, device=device)
        self.weight = 1.0

    def bring(self, pairs: Mapping[int, Mapping[int, PairPart]], num_rows: int) -> None:
        """Which member does what in which of the steps to come."""
        steps = {(step, row) for row, own in pairs.items() for step, part in own.items() if part is PairPart.HOLD}
        if steps or bool(pairs and self._held is not None):
            holds = torch.zeros(len(self._holds), num_rows, dtype=torch.bool)
            for step, row in steps:
                holds[step, row] = True
            self._holds.copy_(holds)

    def works(self, place: Tensor) -> dict[PairPart, Callable[[], None]]:
        """Both as work that can be recorded; `place` says which step it is."""
        if self._held is None:
            self._held = torch.zeros_like(self._grads)
        return {PairPart.HOLD: partial(self._hold, place), PairPart.COMPARE: partial(self._compare, place)}

    def _hold(self, place: Tensor) -> None:
        assert self._held is not None
        holds = self._holds.index_select(0, place)[0]
        self._held.copy_(torch.where(holds[:, None], self._grads * self.weight, self._held))

    def _compare(self, place: Tensor) -> None:
        """Of all rows; only those of members that compare are read."""
        assert self._held is not None
        dots = torch.zeros(len(self._grads), device=self._grads.device)
        apart = torch.zeros_like(dots)
        for column in self._stacked.columns:
            before, now = column.of(self._held).flatten(1), column.of(self._grads).flatten(1) * self.weight
            if self._numbers is not None:
                weights = self._weights(column.of(self._stacked.second).flatten(1))
                before, now = before * weights, now * weights
            dots += (before * now).sum(1)
            apart += (before - now).square().sum(1)
        self.found.index_copy_(0, place, torch.stack([dots, apart], dim=1)[None])

    def _weights(self, second: Tensor) -> Tensor:
        """As `batch.noise.weights_of`: 1 / (sqrt(v_hat) + eps), damped by the root mean square of the parameter."""
        assert self._numbers is not None
        beta2, eps = (number[:, None] for number in self._numbers.unbind(1))
        correction = (1.0 - beta2 ** self._stacked.steps.clamp(min=1.0)[:, None]).sqrt()
        return correction / (second.sqrt() + second.mean(1, keepdim=True).sqrt() + eps * correction)
