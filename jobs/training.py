"""A declared training as the orchestrator uses it: a person's class, with defaults for what it leaves out.

The class is plain: its parts and their defaults are in `jobs/README.md`, their names in `jobs.parts`. The jobs of the
table are such classes. What a part returns is checked here, so that a mistake is one message that names the class, what
it returned and what is allowed; what it raises is passed on as it is.
Knows nothing of how it is run. Made by whoever begins a trial; called by the stepper and by the loop.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.jobs.data import Indices
from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.loading import SampleReader
from orchestrator.jobs.own import UserCodeError
from orchestrator.jobs.param import did_you_mean
from orchestrator.jobs.parts import missing_parts
from orchestrator.jobs.samples import Samples, eval_batches, moved, samples_of, size_of

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_JOBS = __name__.rpartition(".")[0]
_LOSS = "the mean loss as a scalar tensor, a pair (sum, number of elements), or LossTerms"


class Training:
    """A declared training. Attributes of the class that have a default are read once, when the trial begins.

    Attributes:
        own: the object of the user's class.
        name: of the training, for messages and for what is kept by kind.
        metric: name of the validation metric that a search looks at.
        clip_norm: gradients are clipped to this norm; None: not.
        clip_value: each element of a gradient is clipped to this size; None: not.
        warmup_steps: steps at the start batch over which learning rates rise from zero, a twentieth of the trial at
            most; 0 for none.
    """

    def __init__(self, own: Any) -> None:  # noqa: ANN401 - the user's
        """Read the declaration.

        Raises:
            UserCodeError: a part is missing, or an attribute is not of its kind.
        """
        self.own = own
        self.title = _title_of(own)
        missing = list(missing_parts(type(own)))
        if missing:
            raise UserCodeError(f"{self.title} has no {'; no '.join(missing)}; a training needs each of these")
        self.name: str = getattr(own, "name", "") or f"{type(own).__module__}:{type(own).__qualname__}"
        self.metric: str = getattr(own, "metric", "") or ""
        self.clip_norm = self._number("clip_norm")
        self.clip_value = self._number("clip_value")
        self.warmup_steps = int(self._number("warmup_steps") or 0)
        self.has_own_step = callable(getattr(own, "train_step", None))
        self._takes_device = callable(getattr(own, "evaluate", None)) and _num_positional(own.evaluate) > 1
        self._samples: Samples | None = None
        self._data: Any = None
        self._is_mean: bool | None = None

    @classmethod
    def of(cls, own: object) -> Training:
        """The training that a user's object declares; one that is a `Training` already stays as it is."""
        return own if isinstance(own, cls) else cls(own)

    def prepare(self) -> None:
        """Load what is loaded once. Called before the first batch."""
        if hasattr(self.own, "prepare"):
            self.own.prepare()
        if self._data is None and hasattr(self.own, "train_data"):
            self._data = self.own.train_data()

    def open(self, seed: int) -> None:
        """Make ready to read samples of a trial with that seed; again for another trial."""
        if self._samples is not None:
            self._samples.close()
        if hasattr(self.own, "train_data"):
            self.prepare()
            self._samples = samples_of(self._data, seed, self.title)

    def close(self) -> None:
        """Give up loader processes and open files."""
        reader = self.reader
        if reader is not None:
            reader.close()

    @property
    def reader(self) -> SampleReader | Samples | None:
        """What reads samples while it trains, told of the next step's; None where all are in memory."""
        return getattr(self.own, "reader", None) if self._samples is None else self._samples

    @property
    def counts_epochs(self) -> bool:
        """Whether samples are numbered through all epochs."""
        return self._samples is not None

    @property
    def num_train_samples(self) -> int:
        """Samples per epoch."""
        return int(self.own.num_train_samples) if self._samples is None else self._samples.num_samples

    def batch(self, numbers: Sequence[int] | Indices, device: torch.device) -> Any:  # noqa: ANN401 - the user's
        """The samples of those numbers as one batch on `device`."""
        return self.own.batch(numbers, device) if self._samples is None else self._samples.batch(numbers, device)

    def build_model(self) -> nn.Module:
        """A freshly initialised model, drawn from torch's global generator.

        Raises:
            UserCodeError: what was returned is no model.
        """
        model = self.own.build_model()
        if not isinstance(model, nn.Module):
            raise self._wrong("build_model", model, "an nn.Module")
        return model

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The parts worth sharding one by one when there is more than one rank, in forward order; none by default."""
        return list(self.own.blocks(model)) if hasattr(self.own, "blocks") else []

    @property
    def scheduler_interval(self) -> Literal["step", "epoch"]:
        """Whether schedulers count optimizer steps at the start batch, or epochs."""
        word: Literal["step", "epoch"] = self._word("scheduler_interval", ("step", "epoch"))
        return word

    @property
    def monitor(self) -> str:
        """Name of the metric that `ReduceLROnPlateau` is told; empty: the one of the search."""
        return str(getattr(self.own, "monitor", "") or "")

    @property
    def forward_methods(self) -> Sequence[str]:
        """Methods of the model, beside `forward`, that the training calls for a forward pass."""
        return tuple(getattr(self.own, "forward_methods", ()))

    def note_progress(self, step: int, epoch: int) -> None:
        """Tell a training that asks for it how many steps and whole epochs are done."""
        if hasattr(self.own, "note_progress"):
            self.own.note_progress(step, epoch)

    def build_optimizers(
        self, model: nn.Module, num_steps: int
    ) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        """The optimizers and the schedulers, in the order in which they were returned.

        `num_steps` is the number of steps of the whole trial at its start batch, for schedules that need it.

        Raises:
            UserCodeError: what was returned are none, or not of this model.
        """
        takes_steps = _num_positional(self.own.build_optimizer) > 1
        returned = self.own.build_optimizer(model, num_steps) if takes_steps else self.own.build_optimizer(model)
        allowed = "an optimizer, or a tuple or list of optimizers and learning-rate schedulers"
        members = list(_flat(returned))
        optimizers = [each for each in members if isinstance(each, torch.optim.Optimizer)]
        schedulers = [each for each in members if isinstance(each, LRScheduler)]
        if not optimizers or len(optimizers) + len(schedulers) != len(members):
            raise self._wrong("build_optimizer", returned, allowed)
        known = {id(param) for param in model.parameters()}
        held = [param for each in optimizers for group in each.param_groups for param in group["params"]]
        if any(id(param) not in known for param in held):
            raise UserCodeError(
                f"{self.title}.build_optimizer(model) returned an optimizer of parameters that are not the model's;"
                " allowed: parameters of the model that it is given"
            )
        if len({id(param) for param in held}) < len(held):
            raise UserCodeError(
                f"{self.title}.build_optimizer(model) gave a parameter to two optimizers; allowed: one for each"
            )
        return optimizers, schedulers

    def learning_rate_rule(self, optimizer: torch.optim.Optimizer) -> str:
        """How learning rates follow the batch: as declared; else 'linear' for SGD and 'sqrt' for what is like Adam."""
        default = "linear" if isinstance(optimizer, torch.optim.SGD) else "sqrt"
        return str(self._word("learning_rate_rule", (default, "sqrt", "linear", "none")))

    def needs_whole_batches(self, model: nn.Module) -> str:
        """Why a micro-batch cannot be cut without changing the loss of its samples, empty where it can."""
        if self.has_own_step:
            return "train_step takes a batch as it is"
        if getattr(self.own, "depends_on_batch", False):
            return "the loss of a sample depends on the others of its micro-batch"
        norms = sum(isinstance(module, _BATCH_NORMS) for module in model.modules())
        return f"{norms} BatchNorm layers take their statistics from the micro-batch" if norms else ""

    def num_elements(self, num_samples: int) -> int | None:
        """Loss elements in that many training samples, where that is known without the samples."""
        return int(self.own.num_elements(num_samples)) if hasattr(self.own, "num_elements") else None

    @property
    def why_not_replayed(self) -> str:
        """Why steps cannot be recorded and replayed, empty where they can; asked when a step was done."""
        own_reason = getattr(self.own, "why_not_replayed", "")
        if self.has_own_step or own_reason:
            return str(own_reason) or "train_step is not recorded"
        if hasattr(self.own, "after_step"):
            return "after_step is called between steps"
        if not self._is_mean and not hasattr(self.own, "num_elements"):
            return "the number of loss elements is known only with the batch"
        return ""

    def loss(self, model: nn.Module, batch: Any) -> LossTerms:  # noqa: ANN401 - the user's
        """Forward pass and loss of a batch.

        Raises:
            UserCodeError: what was returned is no loss.
        """
        returned = self.own.loss(model, batch)
        if isinstance(returned, LossTerms):
            return returned
        return self._terms(returned)

    def train_step(self, model: nn.Module, batch: Any, optimizers: Sequence[torch.optim.Optimizer]) -> Tensor:  # noqa: ANN401
        """A whole step of the user's own; returns its loss, a scalar.

        Raises:
            UserCodeError: what was returned is no loss.
        """
        returned = self.own.train_step(model, batch, *optimizers)
        is_scalar = isinstance(returned, int | float) or (isinstance(returned, Tensor) and returned.numel() == 1)
        if not is_scalar:
            raise self._wrong("train_step", returned, "the loss of the step as a scalar tensor or a number")
        return torch.as_tensor(returned).detach().reshape(())

    def after_step(self, model: nn.Module) -> None:
        """What the user does behind each step, such as an exponential moving average of the weights."""
        if hasattr(self.own, "after_step"):
            self.own.after_step(model)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Validation metrics.

        Raises:
            UserCodeError: what was returned are none.
        """
        if not hasattr(self.own, "evaluate"):
            return {"val_loss": self._mean_loss(model, device)}
        with torch.no_grad():
            returned = self.own.evaluate(model, device) if self._takes_device else self.own.evaluate(model)
        if not isinstance(returned, Mapping) or not all(_is_number(value) for value in returned.values()):
            raise self._wrong("evaluate", returned, "a dict of names and numbers")
        return {str(name): float(value) for name, value in returned.items()}

    def checked(self, metrics: dict[str, float], metric: str) -> dict[str, float]:
        """The same metrics, once the one that the search looks at was found among them.

        Raises:
            UserCodeError: it is missing.
        """
        wanted = metric or self.metric
        if wanted and wanted not in metrics:
            raise UserCodeError(
                f"{self.title} has no metric {wanted!r}, which the search looks at; evaluate returned:"
                f" {', '.join(metrics) or 'nothing'}.{did_you_mean(wanted, metrics)}"
            )
        return metrics

    def state(self) -> Any:  # noqa: ANN401 - the user's
        """What the user wants kept in checkpoints, anything that can be pickled; None for nothing."""
        return self.own.state_dict() if hasattr(self.own, "state_dict") else None

    def load_state(self, state: Any) -> None:  # noqa: ANN401 - the user's
        """Give back what `state` returned."""
        if state is not None and hasattr(self.own, "load_state_dict"):
            self.own.load_state_dict(state)

    def _mean_loss(self, model: nn.Module, device: torch.device) -> float:
        """The mean loss over the batches of `eval_data()`, each weighted by its elements."""
        total, num_elements = 0.0, 0
        with torch.no_grad():
            for batch in eval_batches(self.own.eval_data(), self.title):
                terms = self.loss(model, moved(batch, device))
                weight = (size_of(batch) or 1) if terms.is_mean else terms.num_elements
                total += float(terms.loss_sum) * (weight if terms.is_mean else 1)
                num_elements += weight
        if not num_elements:
            raise UserCodeError(f"{self.title}.eval_data() has no samples; allowed: at least 1")
        return total / num_elements

    def _terms(self, returned: Any) -> LossTerms:  # noqa: ANN401 - the user's
        """A mean or a pair as `LossTerms`."""
        if isinstance(returned, Tensor) and returned.numel() == 1:
            self._is_mean = True
            return LossTerms(loss_sum=returned.reshape(()), num_elements=1, is_mean=True)
        if isinstance(returned, tuple | list) and len(returned) == 2:
            loss_sum, count = returned
            if isinstance(loss_sum, Tensor) and loss_sum.numel() == 1 and _is_number(count) and int(count) >= 0:
                self._is_mean = False
                return LossTerms(loss_sum=loss_sum.reshape(()), num_elements=int(count))
        raise self._wrong("loss", returned, _LOSS)

    def _number(self, name: str) -> float | None:
        value = getattr(self.own, name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise UserCodeError(f"{self.title}.{name} is {value!r}; allowed: a number >= 0, or None")
        return float(value)

    def _word(self, name: str, allowed: Sequence[str]) -> Any:  # noqa: ANN401 - one of the words
        value = getattr(self.own, name, None) or allowed[0]
        if value not in allowed:
            raise UserCodeError(f"{self.title}.{name} is {value!r}; allowed: {', '.join(dict.fromkeys(allowed))}")
        return value

    def _wrong(self, part: str, returned: object, allowed: str) -> UserCodeError:
        return UserCodeError(f"{self.title}.{part} returned {_in_words(returned)}; allowed: {allowed}")


def _flat(value: object) -> list[object]:
    """The members of nested tuples and lists."""
    return [member for each in value for member in _flat(each)] if isinstance(value, tuple | list) else [value]


def _title_of(own: object) -> str:
    """The name of a training in messages: its class, or what a ready-made one was made of."""
    title = getattr(own, "title", "")
    return title if isinstance(title, str) and title and type(own).__module__.startswith(_JOBS) else type(own).__name__


def _num_positional(function: Any) -> int:  # noqa: ANN401 - the user's
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds for parameter in inspect.signature(function).parameters.values())


def _is_number(value: object) -> bool:
    return (
        (isinstance(value, int | float) and not isinstance(value, bool))
        or (isinstance(value, Tensor) and value.numel() == 1)
        or (hasattr(value, "__float__") and not isinstance(value, Tensor))
    )


def _in_words(value: object) -> str:
    """What a value is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(each).__name__ for each in value) or 'nothing'}"
    if isinstance(value, Mapping):
        wrong = [f"{name}: {type(each).__name__}" for name, each in value.items() if not _is_number(each)]
        return f"a {type(value).__name__} with {', '.join(wrong[:3]) or 'no entries'}"
    return "None" if value is None else f"a {type(value).__name__}"
