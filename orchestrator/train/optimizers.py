"""The optimizers and learning-rate schedulers of one trial: their rates around each step, and their state.

Rates and schedules are the training's own. Before a step each group's rate is multiplied by what the batch in force and
the warm-up ask for; a scheduler sees the rate without that. Schedulers count samples, in units of the start batch or of
an epoch: a schedule means the same at every batch. Called by the stepper.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_RATES = frozenset({"lr", "initial_lr"})
Rate = Callable[[float], float]
"""The rate of a step, from the rate that the training's schedule says."""


class Together:
    """Several optimizers as one: their groups and their state, for whoever keeps or moves them."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = tuple(members)

    @property
    def name(self) -> str:
        """The classes of all members."""
        return "+".join(type(member).__name__ for member in self._members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members, in order."""
        return [group for member in self._members for group in member.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of all members, which share no parameter, by parameter; not to be written."""
        return {param: values for member in self._members for param, values in member.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for member in self._members:
            member.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Step every member."""
        for member in self._members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        """As torch has it, parameters numbered through all members."""
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        for shift, held in self._shifted():
            whole["state"] |= {index + shift: values for index, values in held["state"].items()}
            whole["param_groups"] += [
                {**group, "params": [index + shift for index in group["params"]]} for group in held["param_groups"]
            ]
        return whole

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        groups = iter(whole["param_groups"])
        for member, (shift, held) in zip(self._members, list(self._shifted()), strict=True):
            own = [next(groups) for _ in held["param_groups"]]
            indices = {index for group in own for index in group["params"]}
            member.load_state_dict(
                {
                    "state": {i - shift: values for i, values in whole["state"].items() if i in indices},
                    "param_groups": [{**g, "params": [i - shift for i in g["params"]]} for g in own],
                }
            )

    def _shifted(self) -> list[tuple[int, dict[str, Any]]]:
        shift, found = 0, []
        for member in self._members:
            held = member.state_dict()
            found.append((shift, held))
            shift += sum(len(group["params"]) for group in held["param_groups"])
        return found


class Optimizers:
    """The optimizers and schedulers of one trial.

    Attributes:
        members: the optimizers, in the order in which the training returned them.
        one: all of them as one; the optimizer itself where there is one.
        needs_closure: whether `step` asks for the loss again, as that of LBFGS does.
    """

    def __init__(
        self,
        members: Sequence[Optimizer],
        schedulers: Sequence[LRScheduler],
        unit_samples: int,
        most_units: int | None = None,
    ) -> None:
        """`unit_samples` is what schedulers count: the samples of a start batch or of an epoch. `most_units` are in a
        whole trial; a last step that is larger takes no schedule beyond its end, where some raise.
        """
        self.members, self._schedulers = tuple(members), tuple(schedulers)
        self.one = as_one(members)
        self.needs_closure = any(_asks_for_closure(member) for member in members)
        self._unit_samples, self._num_units, self._most_units = unit_samples, 0, most_units
        self._first_numbers = [_fixed(group) for group in self._groups]
        self._bases = [float(group["lr"]) for group in self._groups]
        self._first_bases = list(self._bases)
        self._applied: list[float | None] = list(self._bases)

    @property
    def has_schedulers(self) -> bool:
        """Whether rates follow a schedule of the training's own."""
        return bool(self._schedulers)

    @property
    def is_scheduled(self) -> bool:
        """Whether rates are not those that the training began with: by a schedule, or by hand."""
        return bool(self._schedulers) or self._bases != self._first_bases

    @property
    def why_not_replayed(self) -> str | None:
        """Why recorded steps would be wrong; None where they are right.

        The rate is read from memory, the other numbers of a group are part of a recording: `OneCycleLR`, for one,
        turns betas as well, unless it is told `cycle_momentum=False`.
        """
        for group, first in zip(self._groups, self._first_numbers, strict=True):
            changed = [name for name, value in first.items() if group.get(name) != value]
            if changed:
                return f"a schedule changes {changed[0]}"
        return None

    @property
    def bases(self) -> list[float]:
        """The rate of each group as the training's schedule says it."""
        return self._bases

    def apply(self, rate: Rate) -> float:
        """Set every group's rate for the next step; returns the first one. A tensor is filled in place, so that a
        captured graph sees it.
        """
        for number, group in enumerate(self._groups):
            held = group["lr"]
            if not isinstance(held, Tensor) and held != self._applied[number]:
                self._bases[number] = held  # somebody else set it, such as the training itself
            wanted = rate(self._bases[number])
            self._applied[number] = wanted
            if isinstance(held, Tensor):
                held.fill_(wanted)
            else:
                group["lr"] = wanted
        first = self._applied[0]
        assert first is not None
        return first

    def advance(self, num_samples: int) -> None:
        """Step the schedulers so that they have counted all whole units in so many samples of the trial."""
        if not self._schedulers:
            return
        due = num_samples // self._unit_samples
        due = due if self._most_units is None else min(due, self._most_units)
        while self._num_units < due:
            self._num_units += 1
            with self._bases_in_place():
                for each in self._schedulers:
                    if not _wants_metric(each):
                        each.step()

    def take_metric(self, value: float | None) -> None:
        """Tell schedulers that follow a metric, such as `ReduceLROnPlateau`, what an evaluation found."""
        following = [each for each in self._schedulers if _wants_metric(each)]
        if following and value is not None:
            with self._bases_in_place():
                for each in following:
                    cast(Any, each).step(value)

    def state(self, *, with_members: bool) -> dict[str, Any]:
        """What a checkpoint must keep beside the tensors: rates and schedulers; and all of the members' state where it
        is more than tensors and plain values.
        """
        kept: dict[str, Any] = {"bases": list(self._bases), "num_units": self._num_units}
        kept["schedulers"] = [each.state_dict() for each in self._schedulers]
        if with_members:
            kept["members"] = [each.state_dict() for each in self.members]
        return kept

    def load(self, kept: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        kept = copy.deepcopy(kept)  # an optimizer keeps what it is given
        for member, held in zip(self.members, kept.get("members", ()), strict=False):
            member.load_state_dict(held)
        for scheduler, held in zip(self._schedulers, kept["schedulers"], strict=True):
            scheduler.load_state_dict(held)
        self._bases, self._num_units = list(kept["bases"]), int(kept["num_units"])
        self.forget_applied()

    def forget_applied(self) -> None:
        """The rates in the groups are those of before, whoever set them: the next step sets them anew."""
        self._applied = [None if isinstance(group["lr"], Tensor) else group["lr"] for group in self._groups]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.one.param_groups

    @contextmanager
    def _bases_in_place(self) -> Iterator[None]:
        """Let a scheduler see and set the rates without what the batch multiplies them by."""
        held = [group["lr"] for group in self._groups]
        for group, base in zip(self._groups, self._bases, strict=True):
            group["lr"] = base
        yield
        self._bases = [float(group["lr"]) for group in self._groups]
        for number, (group, before) in enumerate(zip(self._groups, held, strict=True)):
            group["lr"] = before if isinstance(before, Tensor) else self._bases[number]
        self.forget_applied()


def as_one(members: Sequence[Optimizer]) -> Optimizer:
    """All optimizers as one; the optimizer itself where there is one."""
    return members[0] if len(members) == 1 else cast(Optimizer, Together(members))


def _wants_metric(scheduler: LRScheduler) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau)


def _fixed(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a group that a step is made with, but for its rate."""
    kinds = (bool, int, float, tuple, str)
    return {name: value for name, value in group.items() if isinstance(value, kinds) and name not in _RATES}


def _asks_for_closure(optimizer: Optimizer) -> bool:
    """Whether `step` cannot be called without a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def name_of(optimizer: Optimizer) -> str:
    """The class of an optimizer, or of all that were put together."""
    return optimizer.name if isinstance(optimizer, Together) else type(optimizer).__name__


def has_plain_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the state of each parameter is tensors and plain values only."""
    return all(
        isinstance(value, Tensor | int | float | str | bool | None)
        for values in optimizer.state.values()
        for value in values.values()
    )
