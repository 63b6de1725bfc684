"""What the members of a bundle hold, stacked: one row per member, one column range per parameter.

While a trial is in a bundle its parameters and its optimizer's state are views of its row, so whatever looks at the
trial (an evaluation, a commit, a probe of a tier) sees and writes what the bundle steps. `release` gives each its own
memory again. Knows no step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ALIGNMENT = 64
"""Parameters begin at multiples of so many elements: batched products read them fastest there."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where a parameter lies in every row."""

    name: str
    begin: int
    end: int
    shape: tuple[int, ...]

    def of(self, matrix: Tensor) -> Tensor:
        """That parameter of all rows, (K, *shape), sharing memory with `matrix`."""
        return matrix[:, self.begin : self.end].view(-1, *self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """The columns of one group of the optimizer; what lies between two parameters stays zero."""

    begin: int
    end: int
    columns: tuple[Column, ...]


class Stacked:
    """Rows of members, and further rows that are nobody's, so that a bundle may be larger than its members.

    Attributes:
        groups: column ranges by group of the optimizer.
        values: parameters, (K, N).
        first, second: momentum and, for Adam, second moments, (K, N); empty where the optimizer keeps none.
        steps: updates of each member, float, (K,).
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        counts: Sequence[int],
        num_rows: int,
    ) -> None:
        """`counts` is how many updates each member has had, where its optimizer does not count them."""
        self._models, self._optimizers = tuple(models), tuple(optimizers)
        self._is_adam = not isinstance(optimizers[0], torch.optim.SGD)
        self.groups = _groups_of(models[0], optimizers[0])
        self.columns = tuple(column for group in self.groups for column in group.columns)
        self.num_columns = self.groups[-1].end
        device = next(models[0].parameters()).device
        self.values = torch.zeros(num_rows, self.num_columns, device=device)
        num_moments = self.num_columns if self._keeps_state else 0
        self.first = torch.zeros(num_rows, num_moments, device=device)
        self.second = torch.zeros(num_rows, num_moments if self._is_adam else 0, device=device)
        self.steps = torch.tensor([float(count) for count in counts] + [0.0] * (num_rows - len(counts)), device=device)
        for row in range(num_rows):
            self._take(row)

    def release(self) -> None:
        """Give every member its own memory; the rows are nobody's afterwards."""
        for model, optimizer in zip(self._models, self._optimizers, strict=True):
            for param in model.parameters():
                if param.requires_grad:
                    param.data = param.data.clone()
            for group in optimizer.param_groups:
                is_on_device = bool(group.get("fused") or group.get("capturable"))
                for param in group["params"]:
                    state = optimizer.state[param]
                    for key, value in state.items():
                        if isinstance(value, Tensor):
                            state[key] = value.clone() if key != "step" or is_on_device else value.cpu().clone()

    @property
    def _keeps_state(self) -> bool:
        return self._is_adam or any(g.get("momentum") for each in self._optimizers for g in each.param_groups)

    def _take(self, row: int) -> None:
        """Copy a member into its row and let it look there; rows beyond the members copy the first."""
        is_member = row < len(self._models)
        source = row if is_member else 0
        model, optimizer = self._models[source], self._optimizers[source]
        params = dict(model.named_parameters())
        options = {id(param): group for group in optimizer.param_groups for param in group["params"]}
        for column in self.columns:
            param = params[column.name]
            view = column.of(self.values)[row]
            view.copy_(param.detach())
            group = options[id(param)]
            state = optimizer.state[param]
            if self._is_adam:
                kept = {"exp_avg": column.of(self.first)[row], "exp_avg_sq": column.of(self.second)[row]}
                self.steps[row] = float(state.get("step", 0.0))
            else:
                kept = {"momentum_buffer": column.of(self.first)[row]} if group.get("momentum") else {}
            for key, held in kept.items():
                if state.get(key) is not None:
                    held.copy_(state[key])
            if is_member:
                param.data = view
                state.update(kept)
                if self._is_adam:
                    state["step"] = self.steps[row]


def join_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Sequence[Tensor]], Tensor]:
    """What puts gradients of a model, in the order of `Stacked.columns`, side by side as they lie there."""
    groups = _groups_of(model, optimizer)
    columns = [column for group in groups for column in group.columns]
    begins = [*(column.begin for column in columns[1:]), groups[-1].end]
    gaps = [begin - column.end for begin, column in zip(begins, columns, strict=True)]

    def join(grads: Sequence[Tensor]) -> Tensor:
        parts: list[Tensor] = []
        for grad, gap in zip(grads, gaps, strict=True):
            parts.append(grad.reshape(len(grad), -1))
            if gap:
                parts.append(grad.new_zeros(len(grad), gap))
        return torch.cat(parts, dim=1)

    return join


def uneven_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether some parameters have been updated more often than others, which one number a row cannot say."""
    counts = {
        float(optimizer.state[param]["step"])
        for group in optimizer.param_groups
        for param in group["params"]
        if "step" in optimizer.state.get(param, {})
    }
    num_with = sum(
        "step" in optimizer.state.get(param, {}) for group in optimizer.param_groups for param in group["params"]
    )
    num_params = sum(len(group["params"]) for group in optimizer.param_groups)
    return len(counts) > 1 or num_with not in {0, num_params}


def _groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Group, ...]:
    names = {id(param): name for name, param in model.named_parameters()}
    groups, begin = [], 0
    for group in optimizer.param_groups:
        columns, first = [], begin
        for param in group["params"]:
            end = begin + param.numel()
            columns.append(Column(names[id(param)], begin, end, tuple(param.shape)))
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        groups.append(Group(first, begin, tuple(columns)))
    return tuple(groups)
