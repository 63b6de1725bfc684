"""What a `LightningModule` finds in place of Lightning's `Trainer` in a declared training: progress and logging.

Called by `lightning_model`, and by the user's module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.jobs.own import UserCodeError
from orchestrator.jobs.ready_made import FUNCTION_ROUTE

_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {"max": torch.max, "min": torch.min, "sum": torch.sum}


class Trainer:
    """What a module may ask of its trainer: how far and how long the trial is, and who it is among its ranks.

    Attributes:
        asked: what of it was read while a training step ran.
        training: whether the module trains and does not evaluate.
        estimated_stepping_batches: optimizer steps of the whole trial at its start batch.
    """

    def __init__(self, max_epochs: int | None) -> None:
        self.max_epochs, self.max_steps = max_epochs, -1
        self.estimated_stepping_batches = 0
        self.training, self.sanity_checking = True, False
        self.datamodule: Any = None
        self.logger, self.progress_bar_callback = None, None
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []
        self.callback_metrics: dict[str, float] = {}
        self.asked: set[str] = set()
        self._step, self._epoch, self._is_watched = 0, 0, False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - it only raises
        if name.startswith("__"):
            raise AttributeError(name)
        known = sorted(n for n in (*vars(self), *vars(type(self))) if not n.startswith("_") and n not in _OURS)
        raise AttributeError(
            f"self.trainer.{name} is not known in a declared training; allowed: {', '.join(known)}; else"
            f" {FUNCTION_ROUTE}"
        )

    @property
    def current_epoch(self) -> int:
        """Whole epochs done."""
        return self._told("current_epoch", self._epoch)

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self._told("global_step", self._step)

    @property
    def validating(self) -> bool:
        """Whether it evaluates."""
        return not self.training

    @property
    def world_size(self) -> int:
        """Ranks of the trial."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def global_rank(self) -> int:
        """The number of the calling rank."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        """The same: Lightning counts it on one node."""
        return self.global_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    def note(self, step: int, epoch: int) -> None:
        """How far the trial is."""
        self._step, self._epoch = step, epoch

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take note of what is read within."""
        self._is_watched = True
        try:
            yield
        finally:
            self._is_watched = False

    def _told(self, name: str, value: int) -> int:
        if self._is_watched:
            self.asked.add(name)
        return value


_OURS = ("asked", "note", "watched")


class Logged:
    """What was logged in one evaluation, as Lightning reduces it: means are weighted by the size of each batch.

    Attributes:
        size: samples of the batch that is evaluated.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self._found: dict[str, list[tuple[Tensor, int]]] = {}
        self._reduced: dict[str, str] = {}
        self._metrics: dict[str, Any] = {}

    def add(self, name: str, value: Any, how: Mapping[str, Any]) -> None:  # noqa: ANN401 - number, tensor or metric
        """Take one logged value.

        Raises:
            UserCodeError: its reduction is not known.
        """
        if hasattr(value, "compute") and hasattr(value, "reset"):
            self._metrics[name] = value
            return
        reduction = how.get("reduce_fx", "mean")
        word = reduction if isinstance(reduction, str) else getattr(reduction, "__name__", "")
        word = {"amax": "max", "amin": "min"}.get(word, word)
        if word not in {"mean", *_REDUCED}:
            raise UserCodeError(f"{name} is logged with reduce_fx {reduction!r}; allowed: mean, max, min, sum")
        self._reduced[name] = word
        weight = how.get("batch_size") or self.size or 1
        self._found.setdefault(name, []).append((torch.as_tensor(value).detach().float(), int(weight)))

    def values(self) -> dict[str, float]:
        """Each value of the whole evaluation; metrics are reset."""
        found: dict[str, float] = {}
        for name, parts in self._found.items():
            values = torch.stack([value.reshape(()) for value, _ in parts])
            weights = torch.tensor([float(weight) for _, weight in parts], device=values.device)
            word = self._reduced[name]
            found[name] = float((values * weights).sum() / weights.sum() if word == "mean" else _REDUCED[word](values))
        for name, metric in self._metrics.items():
            found[name] = float(metric.compute())
            metric.reset()
        return found
