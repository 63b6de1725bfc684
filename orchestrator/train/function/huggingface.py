"""The adapter of Hugging Face's `Trainer`, which peft and trl use too.

Its evaluations are offered as reports, together with the checkpoint that it wrote at the same step. A later attempt
goes on from that one, unless the function names another. An absolute `output_dir` is moved below the trial's directory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.train.function.patches import replaced
from orchestrator.train.function.workplace import own_path

if TYPE_CHECKING:
    from orchestrator.train.function.adapters import Host

logger = logging.getLogger(__name__)

COUNTS_STEPS = "the Trainer counts its steps beforehand"
"""With larger batches its data end before them, with smaller ones it sees less of the data."""

PATHS = ("output_dir", "logging_dir")
"""Fields of TrainingArguments; the second is one of older versions, made from the first."""

STATE = "trainer_state.json"
"""The file by which a checkpoint of the Trainer is known."""


@contextmanager
def adapted(module: ModuleType, host: Host) -> Iterator[None]:
    """Watch the Trainers of `transformers.trainer` within.

    Of several Trainers of one function only the first to train has its checkpoints kept: a later attempt could not tell
    whose they are.
    """
    trainer_class, keepers = module.Trainer, list[Any]()
    plain_init, plain_train = trainer_class.__init__, trainer_class.train

    @wraps(plain_init)
    def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
        _move(kwargs.get("args", args[1] if len(args) > 1 else None), host.info.directory)
        plain_init(trainer, *args, **kwargs)
        trainer.add_callback(_callback(module, host, lambda: bool(keepers) and keepers[0] is trainer))

    @wraps(plain_train)
    def train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not keepers:
            keepers.append(trainer)
            kept = _kept(host.checkpoint)
            if kept is not None and _is_open(resume_from_checkpoint, host.info.directory):
                logger.info("the Trainer goes on from %s", kept)
                resume_from_checkpoint = str(kept)
        return plain_train(trainer, resume_from_checkpoint, *args, **kwargs)

    with replaced(trainer_class, "__init__", init), replaced(trainer_class, "train", train):
        yield


def _callback(module: ModuleType, host: Host, keeps: Any) -> Any:
    class Offering(module.TrainerCallback):  # type: ignore[misc, name-defined]
        """Offers the evaluations of a Trainer as reports."""

        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            host.offers.settle()
            host.hold_batch(COUNTS_STEPS)

        def on_evaluate(self, *_args: Any, metrics: Mapping[str, Any], **_kwargs: Any) -> None:
            host.offers.offer(metrics)

        def on_save(self, args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            if host.offers.is_open and keeps():
                host.offers.offer({}, Path(args.output_dir).absolute() / f"checkpoint-{state.global_step}")

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            host.offers.settle()

        def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
            host.offers.settle()

    return Offering()


def _move(arguments: Any, directory: Path) -> None:
    """Make absolute paths in TrainingArguments those of the trial, which would otherwise share them with the others."""
    for name in PATHS:
        path = getattr(arguments, name, None)
        moved = own_path(path, directory) if path else None
        if moved is not None:
            logger.warning("%s %s would be that of all trials: it is %s", name, path, moved)
            setattr(arguments, name, str(moved))


def _kept(checkpoint: Path | None) -> Path | None:
    """The Trainer's checkpoint in a directory that was reported: that itself, or one in it."""
    if checkpoint is None:
        return None
    return next((path.parent for path in sorted(checkpoint.rglob(STATE))), None)


def _is_open(asked: Any, directory: Path) -> bool:
    """Whether it is left to the Trainer where it goes on: nothing is named, or what an earlier attempt has written."""
    if asked is None or isinstance(asked, bool):
        return True
    return Path(asked).resolve().is_relative_to(directory.resolve())
