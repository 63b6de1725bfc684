"""A Hugging Face model with its data and `TrainingArguments` as a declared training.

Optimizer, weight decay by parameter, schedule and the weight of a token are those of the library's `Trainer`, asked of
its public functions. Batches become tuples of tensors, so that steps can be replayed where nothing is masked.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import UserCodeError, load, load_data
from orchestrator.jobs.ready_made import HUGGINGFACE_ARGS, maker_of, split, taken
from orchestrator.jobs.samples import kept_generators, moved, size_of

logger = logging.getLogger(__name__)

_IGNORED = -100
"""The label of an element that has no loss, in all of the library."""
_NUM_LOOKED_AT = 64
"""Samples in which masked labels are looked for before training."""
_COUNT = "num_items_in_batch"


class HuggingFaceTraining:
    """One model with its data, as `jobs.training` asks for it."""

    metric, mode = "eval_loss", "min"

    def __init__(self, key: JobKey, params: Mapping[str, Any]) -> None:
        self._key, self._params = key, dict(params)
        self.name, self.title = key.path, key.path.rpartition(":")[2]
        names = [param.name for param in HUGGINGFACE_ARGS]
        fixed = {param.name: param.default for param in HUGGINGFACE_ARGS} | dict(key.args)
        self._given = {name: params.get(name, fixed[name]) for name in names}
        self._args = _arguments({name: value for name, value in self._given.items() if value is not None})
        self.clip_norm = float(self._args.max_grad_norm or 0) or None
        self._train: Any = None
        self._held_out: Any = None
        self._named: Mapping[str, Any] = {}
        self._columns: tuple[str, ...] = ()
        self._keys: tuple[str, ...] = ()
        self._is_counted = self._shifts = self._takes_count = self._has_warned = False

    def prepare(self) -> None:
        """Load the data.

        Raises:
            UserCodeError: there is none.
        """
        if self._train is not None:
            return
        if self._key.data is None:
            raise UserCodeError(
                f"{self.title} has no data; allowed: job.data with the import path of a data set, or of a function that"
                " returns a pair of those to train on and to evaluate on, or a dict with train, eval, and collate or"
                " compute_metrics"
            )
        make = load_data(self._key.data)
        made = make(**taken(make, self._key.data, self._params, self._of_model() | self._given))
        self._train, self._held_out, self._named = split(made, self._key.data)
        if isinstance(self._train, DataLoader):
            self._named = {"collate": self._train.collate_fn, **self._named}

    def build_model(self) -> nn.Module:
        """The model, from its configuration or by the user's function; what it takes decides about the batches."""
        with kept_generators(), torch.device("cpu"):  # the model is made on its device, data are not
            self.prepare()
        maker, found = maker_of(self._key), load(self._key.path)
        made = maker(**self._of_model())
        model = made if maker is found else found(made)
        if not isinstance(model, nn.Module):
            raise UserCodeError(f"{self._key.path} returned a {type(model).__name__}; allowed: a PreTrainedModel")
        self._look_at(model)
        return model

    def train_data(self) -> Any:  # noqa: ANN401 - a loader
        """The samples, shuffled, with the user's collator; a loader of the user's keeps its order."""
        self.prepare()
        data = self._train
        if isinstance(data, DataLoader):
            return DataLoader(
                data.dataset, sampler=data.sampler, num_workers=data.num_workers, collate_fn=self._collated
            )
        return DataLoader(data, shuffle=not isinstance(data, IterableDataset), collate_fn=self._collated)

    def loss(self, model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - a mean, or a pair of sum and count
        """The model's own loss.

        Raises:
            UserCodeError: the model returns none.
        """
        inputs = self._inputs(batch)
        count = inputs.pop(_COUNT, None)
        if count is not None:
            return self._outputs(model, {**inputs, _COUNT: 1})["loss"], count
        if self._counts_tokens(inputs):  # none is masked: all samples have the same number of them
            inputs[_COUNT] = self._counted(inputs["labels"]).numel()
        return self._outputs(model, inputs)["loss"]

    def build_optimizer(self, model: nn.Module, num_steps: int) -> Any:  # noqa: ANN401 - optimizer and scheduler
        """Optimizer and schedule of the arguments, over so many steps."""
        args = self._args
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))  # its first argument is not read
        params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        make, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        groups = [
            {"params": [param for name, param in params if name in decayed], "weight_decay": args.weight_decay},
            {"params": [param for name, param in params if name not in decayed], "weight_decay": 0.0},
        ]
        optimizer = make(groups, **options)
        scheduler = transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        return optimizer, scheduler

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`eval_loss`, weighted by samples as the library does, and what `compute_metrics` finds.

        Raises:
            UserCodeError: there is nothing to evaluate on.
        """
        if self._held_out is None:
            raise UserCodeError(
                f"{self._key.data} returned no data to evaluate on; allowed: a pair, or a dict with eval"
            )
        total, num_samples = 0.0, 0
        compute = self._named.get("compute_metrics")
        seen: list[tuple[Any, Tensor]] = []
        for batch in self._eval_batches():
            size, inputs = size_of(batch) or 1, dict(moved(batch, device))
            if self._counts_tokens(batch):
                inputs[_COUNT] = _num_unmasked(self._counted(batch["labels"]))
            outputs = self._outputs(model, inputs)
            total, num_samples = total + float(outputs["loss"]) * size, num_samples + size
            if compute is not None:
                seen.append((outputs["logits"].float().cpu().numpy(), batch["labels"].numpy()))
        if not num_samples:
            raise UserCodeError(f"{self._key.data} returned no samples to evaluate on; allowed: at least 1")
        found = {"eval_loss": total / num_samples}
        if compute is not None:
            predictions, labels = (_joined([pair[side] for pair in seen]) for side in (0, 1))
            metrics = compute(transformers.EvalPrediction(predictions=predictions, label_ids=labels))
            found |= {n if str(n).startswith("eval_") else f"eval_{n}": float(v) for n, v in metrics.items()}
        return found

    def _of_model(self) -> dict[str, Any]:
        others = dict(self._given)
        if self._key.data is not None:
            others |= taken(load_data(self._key.data), self._key.data, self._params, others)
        return taken(maker_of(self._key), self._key.path, self._params, others)

    def _look_at(self, model: nn.Module) -> None:
        """Find out what the model takes, and whether micro-batches are weighted by their tokens, as the library does
        for a model that can be told the number of them.
        """
        parameters = inspect.signature(model.forward).parameters
        takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._columns = (*parameters, "label", "label_ids", "labels")
        self._takes_count = bool(getattr(model, "accepts_loss_kwargs", takes_more))
        loss, config = LOSS_MAPPING.get(getattr(model, "loss_type", None)), getattr(model, "config", None)
        self._shifts = loss is ForCausalLMLoss and not getattr(config, "is_encoder_decoder", False)
        if not self._takes_count:
            return
        data: Any = self._train.dataset if isinstance(self._train, DataLoader) else self._train
        if isinstance(data, IterableDataset):
            self._is_counted = True
        else:
            first = [data[n] for n in range(min(_NUM_LOOKED_AT, len(data)))]
            shapes = {tuple(np.shape(sample.get("labels", ()))) for sample in first}
            self._is_counted = len(shapes) > 1 or _is_masked(self._batch(first))

    def _batch(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Samples as the library's trainer would collate them: without what the model does not take."""
        if samples and isinstance(samples[0], Mapping):
            samples = [{n: v for n, v in each.items() if n in self._columns} for each in samples]
        collate = self._named.get("collate") or transformers.default_data_collator
        return dict(collate(samples))

    def _collated(self, samples: Sequence[Any]) -> Any:  # noqa: ANN401 - a batch
        """A batch to train on: a tuple, with the number of its elements in a dict where that has to be known."""
        batch = self._batch(samples)
        if self._is_counted and self._counts_tokens(batch):
            return {**batch, _COUNT: _num_unmasked(self._counted(batch["labels"]))}
        if not self._has_warned and self._counts_tokens(batch) and _is_masked(batch):
            self._has_warned = True
            logger.warning(
                "labels are masked, and those of the first %d samples are not: micro-batches count by their samples",
                _NUM_LOOKED_AT,
            )
        if all(isinstance(value, Tensor) for value in batch.values()):
            self._keys = tuple(batch)
            return tuple(batch.values())
        return batch

    def _counts_tokens(self, batch: Mapping[str, Any]) -> bool:
        """Whether the loss of a batch is a sum over tokens, divided by their number."""
        labels = batch.get("labels")
        return self._takes_count and isinstance(labels, Tensor) and labels.dim() > 1

    def _counted(self, labels: Tensor) -> Tensor:
        """The labels that the library counts: not the first of a row where its loss shifts them."""
        return labels[..., 1:] if self._shifts else labels

    def _outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401 - the library's
        outputs = model(**inputs)
        if outputs.get("loss") is None:
            raise UserCodeError(f"{self.title} returned no loss for {', '.join(inputs)}; allowed: data with labels")
        return outputs

    def _inputs(self, batch: Any) -> dict[str, Any]:  # noqa: ANN401 - a batch
        return dict(zip(self._keys, batch, strict=True)) if isinstance(batch, tuple) else dict(batch)

    def _eval_batches(self) -> Any:  # noqa: ANN401 - batches
        if isinstance(self._held_out, DataLoader):
            return self._held_out
        size = self._given["per_device_eval_batch_size"]
        return DataLoader(self._held_out, batch_size=size, collate_fn=self._batch)


def _arguments(given: Mapping[str, Any]) -> Any:  # noqa: ANN401 - the library's
    """`TrainingArguments` with these values, without the device and the processes that it would take hold of.

    Raises:
        UserCodeError: the library does not know a name.
    """
    from transformers.training_args import OptimizerNames

    class Arguments(transformers.TrainingArguments):  # type: ignore[misc]
        """Values only."""

        def __post_init__(self) -> None:
            for name, names in (("optim", OptimizerNames), ("lr_scheduler_type", transformers.SchedulerType)):
                setattr(self, name, names(getattr(self, name)))

    try:
        return Arguments(output_dir=".", **given)
    except ValueError as error:
        raise UserCodeError(f"job.args: {error}") from None


def _num_unmasked(labels: Tensor) -> int:
    return int((labels != _IGNORED).sum())


def _is_masked(batch: Mapping[str, Any]) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.dim() > 1 and bool((labels == _IGNORED).any())


def _joined(arrays: Sequence[Any]) -> Any:  # noqa: ANN401 - arrays of numpy
    """Arrays one behind the other; shorter rows are filled up with the label of what does not count."""
    widths = {array.shape[1:] for array in arrays}
    if len(widths) == 1:
        return np.concatenate(arrays)
    target = [max(shape[n] for shape in widths) for n in range(len(arrays[0].shape) - 1)]
    filled = [
        np.pad(a, [(0, 0), *((0, t - s) for s, t in zip(a.shape[1:], target, strict=True))], constant_values=_IGNORED)
        for a in arrays
    ]
    return np.concatenate(filled)
