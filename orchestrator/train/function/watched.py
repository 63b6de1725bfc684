"""The model and the optimizer that a function handed over by `orchestrator.watch`.

Their state is written into the trial's commits and loaded in place when an attempt goes on from one; and the model is
computed again on kept calls, which is what `precision.watch` needs to calibrate and probe tiers. Knows neither orders
nor reports; called by the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from orchestrator.errors import FunctionError
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train.flat_state import capture_generators, restore_generators
from orchestrator.train.function.autocast import Autocast
from orchestrator.train.function.calls import Call, Calls

logger = logging.getLogger(__name__)

FILE = "watched.pt"
"""In a commit: state of model, optimizer and random generators."""


class Standing(Protocol):
    """Where the training stands."""

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        ...

    @property
    def progress(self) -> tuple[int, int]:
        """Optimizer steps and samples done."""
        ...

    @property
    def part_done(self) -> float:
        """Part of the trial that is done, 0 where nobody knows."""
        ...


class Watched:
    """One watched model.

    Attributes:
        model: the model itself, without DistributedDataParallel around it.
        given: what the function handed over.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, precision: Autocast, standing: Standing) -> None:
        self.given = model
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._optimizer, self._precision, self._standing = optimizer, precision, standing
        self._saved_optimizer: dict[str, Any] | None = None
        self.calls = Calls(self.model)
        precision.watch(self.model)

    @property
    def is_whole(self) -> bool:
        """Whether this process has all of the model, so that its state can be kept."""
        return all(type(param.data) is Tensor for param in self.model.parameters())

    # State.

    def takes(self, optimizer: Optimizer) -> bool:
        """Make an optimizer that is about to step the model's own, if its parameters are; whether it is."""
        if self._optimizer is None and has_params_of(self.model, optimizer):
            self._optimizer = optimizer
        if optimizer is self._optimizer and self._saved_optimizer is not None:
            saved, self._saved_optimizer = self._saved_optimizer, None
            _load_optimizer(optimizer, saved)
        return optimizer is self._optimizer

    def save(self, directory: Path) -> None:
        """Write the state as it is between two steps into a directory."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "generators": capture_generators(),
        }
        torch.save(state, directory / FILE)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that `save` writes."""
        states = [] if self._optimizer is None else self._optimizer.state.values()
        values = [*self.model.state_dict().values(), *(value for state in states for value in state.values())]
        return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

    def load(self, path: Path) -> None:
        """Load what `save` wrote, in place; an optimizer that is not known yet gets its part before its first step.

        Learning rates and other options stay those of the function, whose schedule they follow.

        Raises:
            FunctionError: it is of another model or optimizer.
        """
        # The commit's files were compared with their SHA-256 before; the state may hold any object of an optimizer's.
        state = torch.load(path, map_location="cpu", weights_only=False)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise FunctionError(
                f"the model given to orchestrator.watch is not the one whose state was kept: {error}; allowed: the same"
                " names and shapes in every attempt of a trial"
            ) from None
        self._saved_optimizer = state["optimizer"]
        if self._optimizer is not None:
            self.takes(self._optimizer)
        restore_generators(state["generators"])

    def close(self) -> None:
        """Leave the model alone."""
        self.calls.drop()

    # What `precision.watch.PrecisionWatch` asks.

    @property
    def optimizer(self) -> Optimizer:
        """Of the model, once it has stepped or was handed over."""
        assert self._optimizer is not None, "asked for once calls are complete and a step was made"
        return self._optimizer

    @property
    def is_ready(self) -> bool:
        """Whether there is something to compute again."""
        return bool(self._optimizer is not None and self.calls.complete)

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        return self._standing.settings

    @property
    def step_index(self) -> int:
        """Steps done."""
        return self._standing.progress[0]

    @property
    def progress(self) -> float:
        """Part of the trial that is done."""
        return self._standing.part_done

    @property
    def may_replay(self) -> bool:
        """A function's steps are not recorded in graphs."""
        return False

    def probe_batch(self, num_samples: int) -> Call:  # noqa: ARG002 - of the size that the function has
        """One of the kept calls."""
        return self.calls.complete[0]

    def probe_halves(self) -> tuple[tuple[Call, Call], int]:
        """Both kept calls, and the samples of each."""
        first, second = self.calls.complete
        return (first, second), self._standing.settings.micro_batch

    def mean_gradient(self, batch: Call, tier: Tier) -> float:
        """Add the gradient of a call computed in `tier`; returns 1 plus by how much that changes the loss."""
        with self._precision.as_if(tier, self._standing.settings.tier):
            return 1.0 + self.calls.replay(batch)

    def add_gradient(self, batch: Call, tier: Tier) -> None:
        """As `mean_gradient`."""
        self.mean_gradient(batch, tier)

    def position(self) -> dict[str, Any]:
        """What beside model and optimizer a step changes: that is the function's own and goes on."""
        return {"step": self.step_index}

    def go_back(self, position: dict[str, Any]) -> None:
        """Model and optimizer were put back; the function's own loop goes on where it is."""
        logger.warning("model and optimizer are those of step %d again", position["step"])

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """Compute gradients within, and put back those that the function has."""
        kept = [(param, param.grad) for param in self.model.parameters()]
        for param, _ in kept:
            param.grad = None
        try:
            yield
        finally:
            for param, grad in kept:
                param.grad = grad


def has_params_of(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether an optimizer has parameters, all of them the model's."""
    known = {id(param) for param in model.parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return bool(params) and all(id(param) in known for param in params)


def check(model: object, optimizer: object, loader: object, before: Watched | None) -> None:
    """Refuse what cannot be watched.

    Raises:
        FunctionError: it names what was given, and what is allowed.
    """
    if not isinstance(model, nn.Module):
        raise FunctionError(f"orchestrator.watch got a {_kind(model)} as model; allowed: a torch.nn.Module")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise FunctionError(
            f"orchestrator.watch got a {_kind(optimizer)} as optimizer; allowed: a torch.optim.Optimizer, or None for"
            " the one that steps the model's parameters"
        )
    if loader is not None and not isinstance(loader, DataLoader):
        raise FunctionError(
            f"orchestrator.watch got a {_kind(loader)} as loader; allowed: the torch.utils.data.DataLoader that it"
            " trains from, or None"
        )
    if before is not None and model is not before.given:
        raise FunctionError(
            f"orchestrator.watch was called with a second model ({_kind(model)} after {_kind(before.given)}); allowed:"
            " one model in a function, the one whose optimizer steps first"
        )
    if optimizer is not None and not has_params_of(model, optimizer):
        raise FunctionError(
            f"orchestrator.watch got a {_kind(optimizer)} with parameters that are not those of the {_kind(model)};"
            " allowed: the optimizer of that model; make it after the model was moved to its device or wrapped"
        )


def _kind(value: object) -> str:
    return type(value).__name__


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer that state; its options (rates, decays) stay."""
    live = optimizer.state_dict()
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (saved, live)]
    if sizes[0] != sizes[1]:
        raise FunctionError(
            f"the optimizer of the watched model has groups of {_listed(sizes[1])} parameters, the one whose state was"
            f" kept had {_listed(sizes[0])}; allowed: the same in every attempt of a trial"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": live["param_groups"]})


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
