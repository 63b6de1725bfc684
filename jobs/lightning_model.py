"""A `LightningModule` as a declared training: its own training step, optimizer, schedule and logged metrics.

The module is not told apart from one that its Trainer drives, as far as what it may ask of a trainer is known here;
what it overrides and nobody would call is refused. Needs no import of Lightning: the user's module brings it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.lightning_trainer import Logged, Trainer
from orchestrator.jobs.own import UserCodeError, load, load_data
from orchestrator.jobs.ready_made import FUNCTION_ROUTE, LIGHTNING_ARGS, split, taken
from orchestrator.jobs.samples import eval_batches, kept_generators, moved, size_of

logger = logging.getLogger(__name__)

_NOT_CALLED = (
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "on_after_backward",
    "on_after_batch_transfer",
    "on_before_backward",
    "on_before_batch_transfer",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_train_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_fit_end",
    "on_validation_batch_end",
    "on_validation_batch_start",
    "optimizer_step",
    "optimizer_zero_grad",
    "transfer_batch_to_device",
)
"""Hooks that a declared training has no place for: its batches have no numbers and its steps are the orchestrator's."""


class LightningTraining:
    """One `LightningModule` with its data, as `jobs.training` asks for it."""

    metric = ""
    forward_methods = ("training_step", "validation_step")

    def __init__(self, key: JobKey, params: Mapping[str, Any]) -> None:
        self._key, self._params = key, dict(params)
        self.name, self.title = key.path, key.path.rpartition(":")[2]
        self._args = {param.name: params.get(param.name, key.args.get(param.name)) for param in LIGHTNING_ARGS}
        clip, how = self._args["gradient_clip_val"], self._args["gradient_clip_algorithm"] or "norm"
        if how not in {"norm", "value"}:
            raise UserCodeError(f"job.args.gradient_clip_algorithm is {how!r}; allowed: norm, value")
        self.clip_norm: float | None = (clip or None) if how == "norm" else None
        self.clip_value: float | None = (clip or None) if how == "value" else None
        self.scheduler_interval, self.monitor = "step", ""
        self.trainer = Trainer(self._args["max_epochs"])
        self._module: Any = None
        self._held_out: Any = None
        self._logged = Logged()
        self._train_metrics: dict[int, Any] = {}
        self._takes_number: dict[str, bool] = {}

    @property
    def why_not_replayed(self) -> str:
        """A replayed step would see the numbers of the step that was recorded."""
        asked = self.trainer.asked
        return f"{self.title}.training_step reads {' and '.join(sorted(asked))}" if asked else ""

    def note_progress(self, step: int, epoch: int) -> None:
        """What `global_step` and `current_epoch` say."""
        self.trainer.note(step, epoch)

    def build_model(self) -> nn.Module:
        """The module, ready to train."""
        self._module = self._made()
        return self._module  # type: ignore[no-any-return]

    def train_data(self) -> Any:  # noqa: ANN401 - the user's
        """The training loader or data set, of the DataModule, of `job.data`, or of the module itself."""
        if self._key.data is None:
            with kept_generators():  # the model of the trial is drawn later, as it would be without this one
                source = self._made()
            return self._loaders_of(source, self.title)
        make = load_data(self._key.data)
        made = make(**taken(make, self._key.data, self._params, self._taken_by_module() | self._args))
        if hasattr(made, "train_dataloader"):
            made.trainer, self.trainer.datamodule = self.trainer, made
            made.prepare_data()
            made.setup("fit")
            return self._loaders_of(made, self._key.data)
        train, self._held_out, _ = split(made, self._key.data)
        return train

    def loss(self, model: Any, batch: Any) -> Tensor:  # noqa: ANN401 - the user's
        """What `training_step` returns, or has under the name loss.

        Raises:
            UserCodeError: it is no loss.
        """
        self.trainer.training, self._logged.size = True, None
        with self.trainer.watched():
            returned = model.training_step(*self._arguments("training_step", batch, 0))
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserCodeError(
                f"{self.title}.training_step returned {type(returned).__name__}; allowed: the loss as a scalar tensor,"
                " or a dict with it as loss"
            )
        return loss

    def build_optimizer(self, model: Any, num_steps: int) -> Any:  # noqa: ANN401 - the user's
        """What `configure_optimizers` returns: one optimizer, and schedulers of one interval.

        Raises:
            UserCodeError: it returned anything else.
        """
        self.trainer.estimated_stepping_batches = num_steps
        returned = model.configure_optimizers()
        optimizers, schedules = _optimizers_of(returned)
        if len(optimizers) != 1:
            raise self._not_here(f"configure_optimizers returned {len(optimizers)} optimizers", "one")
        entries = [each if isinstance(each, Mapping) else {"scheduler": each} for each in schedules]
        words = {str(each.get("interval", "epoch")) for each in entries}
        if len(words) > 1 or any(each.get("frequency", 1) != 1 for each in entries):
            raise self._not_here("configure_optimizers returned schedulers of several intervals", "one, frequency 1")
        self.scheduler_interval = next(iter(words), "step")
        self.monitor = next((str(each["monitor"]) for each in entries if each.get("monitor")), "")
        return (optimizers[0], *(each["scheduler"] for each in entries))

    def evaluate(self, model: Any, device: torch.device) -> dict[str, float]:  # noqa: ANN401 - the user's
        """What `validation_step` and the hooks around it log, over the whole validation data.

        Raises:
            UserCodeError: there is no validation data.
        """
        if self._held_out is None:
            raise UserCodeError(
                f"{self.title} has no validation data; allowed: val_dataloader of the module or the DataModule, or"
                " job.data that returns a pair of data sets"
            )
        self.trainer.training, self._logged = False, Logged()
        model.on_validation_start()
        model.on_validation_epoch_start()
        for number, batch in enumerate(eval_batches(self._held_out, self.title)):
            self._logged.size = size_of(batch) or 1
            model.validation_step(*self._arguments("validation_step", moved(batch, device), number))
        self._logged.size = 1
        model.on_validation_epoch_end()
        model.on_validation_end()
        for metric in self._train_metrics.values():
            metric.reset()
        self.trainer.training = True
        found = self._logged.values()
        self.trainer.callback_metrics = dict(found)
        return found

    def state_dict(self) -> dict[str, Any] | None:
        """What `on_save_checkpoint` keeps."""
        kept: dict[str, Any] = {}
        if self._module is not None:
            self._module.on_save_checkpoint(kept)
        return kept or None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give it to `on_load_checkpoint`."""
        self._module.on_load_checkpoint(state)

    def _made(self) -> Any:  # noqa: ANN401 - the user's
        """A module as its trainer would begin with it.

        Raises:
            UserCodeError: it is no LightningModule, or overrides what would not be called.
        """
        made = load(self._key.path)(**self._taken_by_module())
        base = next((each for each in type(made).__mro__ if each.__name__ == "LightningModule"), None)
        if base is None:
            raise UserCodeError(f"{self._key.path} returned a {type(made).__name__}; allowed: a LightningModule")
        made.trainer, made.log = self.trainer, self._log
        for step in self.forward_methods:  # sharding puts others in their place, whose parameters say nothing
            self._takes_number[step] = len(inspect.signature(getattr(made, step)).parameters) > 1
        self._refuse(made, base)
        made.prepare_data()
        made.setup("fit")
        if hasattr(made, "configure_model"):
            made.configure_model()
        made.on_fit_start()
        made.on_train_start()
        return made

    def _log(self, name: str, value: Any, *_args: Any, **how: Any) -> None:  # noqa: ANN401 - as Lightning's
        """Take the place of `LightningModule.log`: what is logged while it evaluates is a metric of the report."""
        if not self.trainer.training:
            self._logged.add(name, value, how)
        elif hasattr(value, "reset"):
            self._train_metrics[id(value)] = value

    def _arguments(self, step: str, batch: Any, number: int) -> tuple[Any, ...]:  # noqa: ANN401 - the user's
        """What a step is called with: the batch, and its number where it takes one.

        In training the number is always 0: batches have none that would mean the same at every batch size.
        """
        return (batch, number) if self._takes_number[step] else (batch,)

    def _taken_by_module(self) -> dict[str, Any]:
        make, path, args = load(self._key.path), self._key.path, self._args
        of_data = {} if self._key.data is None else taken(load_data(self._key.data), self._key.data, self._params, args)
        return taken(make, path, self._params, of_data | args)

    def _loaders_of(self, source: Any, name: str) -> Any:  # noqa: ANN401 - the user's
        """The training loader of a module or a DataModule; the validation loader is kept."""
        loaders = {}
        for part in ("train_dataloader", "val_dataloader"):
            try:
                loaders[part] = getattr(source, part)()
            except Exception as error:
                # Lightning's own default raises an exception of its own, which means that there is none.
                if type(error).__name__ != "MisconfigurationException":
                    raise
                loaders[part] = None
        if loaders["train_dataloader"] is None:
            raise UserCodeError(f"{name} has no train_dataloader; allowed: one, or a LightningDataModule as job.data")
        held_out = loaders["val_dataloader"]
        if isinstance(held_out, Sequence | Mapping) and not hasattr(held_out, "dataset"):
            if len(held_out) > 1:
                raise self._not_here(f"val_dataloader of {name} returned {len(held_out)} loaders", "one")
            held_out = next(iter(held_out.values() if isinstance(held_out, Mapping) else held_out), None)
        self._held_out = held_out
        return loaders["train_dataloader"]

    def _refuse(self, module: Any, base: type) -> None:  # noqa: ANN401 - the user's
        """Refuse what would silently not be done.

        Raises:
            UserCodeError: the module optimizes by hand, or overrides hooks that are not called.
        """
        if not module.automatic_optimization:
            raise self._not_here("automatic_optimization is off", "on")
        own = [n for n in _NOT_CALLED if getattr(type(module), n, None) is not getattr(base, n, None)]
        if own:
            raise self._not_here(f"it overrides {', '.join(own)}, which nobody would call here", "none of these")

    def _not_here(self, what: str, allowed: str) -> UserCodeError:
        return UserCodeError(f"{self.title}: {what}; allowed in a declared training: {allowed}; else {FUNCTION_ROUTE}")


def _optimizers_of(returned: Any) -> tuple[list[Any], list[Any]]:  # noqa: ANN401 - the user's
    """The optimizers and schedulers in any of the forms that Lightning allows."""
    if isinstance(returned, Mapping):
        schedule = returned.get("lr_scheduler")
        if schedule is not None and not isinstance(schedule, Mapping) and "monitor" in returned:
            schedule = {"scheduler": schedule, "monitor": returned["monitor"]}
        return [returned["optimizer"]], [] if schedule is None else [schedule]
    if not isinstance(returned, tuple | list):
        return ([] if returned is None else [returned]), []
    if len(returned) == 2 and all(isinstance(each, tuple | list) for each in returned):
        return list(returned[0]), list(returned[1])
    optimizers, schedules = [], []
    for each in returned:
        more = _optimizers_of(each)
        optimizers += more[0]
        schedules += more[1]
    return optimizers, schedules
