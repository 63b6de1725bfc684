"""What a job is: a model, data indexed by sample number, a loss and a metric. Nothing about how it is run.

A job is built from its parameters alone; every random choice in it derives from a seed among them, and from torch's
global generator when the model is built. Sample `i` is the same sample for ever, which makes sampling resumable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.loading import SampleReader
from orchestrator.jobs.table import JobInfo

__all__ = ["Job", "JobInfo", "LossTerms", "SampleReader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The loss of some samples as a sum, so that uneven parts add up exactly.

    Attributes:
        loss_sum: scalar tensor with gradient, summed over elements.
        num_elements: how many elements were summed (tokens, images).
        is_mean: whether `loss_sum` is the mean over the samples of a batch instead, and counts as one element.
    """

    loss_sum: Tensor
    num_elements: int
    is_mean: bool = False


class Forward(Protocol):
    """What computes a loss: a training, or one in a precision tier."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], /) -> LossTerms:
        """Forward pass and loss of a batch."""
        ...


class NamedForward(Forward, Protocol):
    """One whose kernels are kept by name."""

    name: str


class Job(Protocol):
    """What the jobs of the table declare, for whoever calls them without a trial. They are trainings like anybody's:
    plain classes, all of whose data is indexed by sample number, built by `JOBS[name](**params)`.
    """

    name: str
    metric: str
    """Name of the validation metric that a search looks at, a key of what `evaluate` returns."""

    @property
    def reader(self) -> SampleReader | None:
        """What reads samples while it trains; None as long as nothing does, as where all samples are in memory."""
        ...

    @property
    def num_train_samples(self) -> int:
        """Samples per epoch; may load the data."""
        ...

    def prepare(self) -> None:
        """Load data into memory (cached per process). Called before the first batch; may be slow once."""
        ...

    def build_model(self) -> nn.Module:
        """A freshly initialised fp32 model on the default device, drawn from torch's global generator."""
        ...

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The parts worth sharding one by one when there is more than one rank, in forward order."""
        ...

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer at the base learning rate, for the start global batch."""
        ...

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """The samples of those numbers, stacked, on `device`. Numbers lie in [0, num_train_samples)."""
        ...

    def num_elements(self, num_samples: int) -> int:
        """Loss elements in that many training samples (tokens of all windows, or the samples themselves)."""
        ...

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """Forward pass and summed loss of a batch."""
        ...

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Validation metrics of the whole (bounded) held-out set, without gradient; always has `metric`."""
        ...
