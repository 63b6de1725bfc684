"""The adapter of Lightning's `Trainer`, under either of its names, `lightning.pytorch` and `pytorch_lightning`.

The metrics that a training logs are offered as reports when it has validated, or at the end of an epoch where it does
not validate, with the checkpoint that it wrote there. A later attempt goes on from that one. Lightning counts the
batches of an epoch beforehand, so the batch changes at the start of one and the count with it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
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

COUNTS_BATCHES = "Lightning validates after a number of batches"
RELOADS = "Lightning makes the loader anew"
UNKNOWN = "this version of Lightning counts its batches in another place"


@contextmanager
def adapted(module: ModuleType, host: Host) -> Iterator[None]:
    """Watch the Trainers of a module within."""
    trainer_class, trainers = module.Trainer, _Trainers(host)
    plain_init, plain_fit, plain_save = trainer_class.__init__, trainer_class.fit, trainer_class.save_checkpoint
    signature = inspect.signature(plain_fit)

    @wraps(plain_init)
    def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("default_root_dir") is not None:
            kwargs["default_root_dir"] = trainers.own(kwargs["default_root_dir"], "default_root_dir")
        plain_init(trainer, *args, **kwargs)
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "dirpath", None) is not None:
                callback.dirpath = trainers.own(callback.dirpath, "dirpath")
        trainer.callbacks.append(_callback(module.Callback, host, trainers.newest))

    @wraps(plain_fit)
    def fit(trainer: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(trainer, *args, **kwargs)
        bound.arguments["ckpt_path"] = trainers.go_on_from(trainer, bound.arguments.get("ckpt_path"))
        host.offers.settle()
        host.freeze_batch(is_frozen=True)
        try:
            plain_fit(*bound.args, **bound.kwargs)
        finally:
            host.freeze_batch(is_frozen=False)

    @wraps(plain_save)
    def save_checkpoint(
        trainer: Any, filepath: Any, weights_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> None:
        plain_save(trainer, filepath, weights_only, *args, **kwargs)
        if not weights_only:
            trainers.saved(trainer, Path(filepath).absolute())

    with (
        replaced(trainer_class, "__init__", init),
        replaced(trainer_class, "fit", fit),
        replaced(trainer_class, "save_checkpoint", save_checkpoint),
    ):
        yield


class _Trainers:
    """The Trainers of one function.

    Only the first to fit has its checkpoints kept: a later attempt could not tell whose they are.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._first: Any = None
        self._step, self._path = -1, Path()

    def own(self, path: Any, name: str) -> Any:
        """`path`, or one below the trial's directory for an absolute one that all trials would share."""
        moved = own_path(path, self._host.info.directory)
        if moved is None:
            return path
        logger.warning("%s %s would be that of all trials: it is %s", name, path, moved)
        return str(moved)

    def go_on_from(self, trainer: Any, asked: Any) -> Any:
        """The checkpoint that a Trainer begins with: the kept one, if none is asked for or Lightning's last."""
        if self._first is not None:
            return asked
        self._first = trainer
        directory = self._host.checkpoint
        kept = None if directory is None else next(iter(sorted(directory.rglob("*.ckpt"))), None)
        if kept is None or asked not in {None, "last"}:
            return asked
        logger.info("the Trainer goes on from %s", kept)
        return str(kept)

    def saved(self, trainer: Any, path: Path) -> None:
        """A Trainer has written all of its state to a file or directory."""
        if trainer is self._first:
            self._step, self._path = trainer.global_step, path

    def newest(self, trainer: Any) -> Path | None:
        """The checkpoint that was written at this very step; None where there is none (any more)."""
        is_now = trainer is self._first and trainer.global_step == self._step and self._path.exists()
        return self._path if is_now else None


def _callback(base: type, host: Host, newest: Callable[[Any], Path | None]) -> Any:
    """A callback that offers what a Trainer logged; `newest` gives its checkpoint of this very step."""

    class Offering(base):  # type: ignore[misc]
        """Offers logged metrics as reports."""

        is_due = False

        def on_validation_end(self, trainer: Any, _module: Any) -> None:
            if trainer.state.fn == "fit":
                self.is_due |= not trainer.sanity_checking
            else:
                host.offers.offer(trainer.callback_metrics)

        def on_test_end(self, trainer: Any, _module: Any) -> None:
            host.offers.offer(trainer.callback_metrics)

        def on_train_epoch_end(self, trainer: Any, _module: Any) -> None:
            self.is_due |= not trainer.enable_validation

        def on_train_epoch_start(self, trainer: Any, _module: Any) -> None:
            self._settle(trainer)
            _begin_epoch(trainer, host)

        def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
            self._settle(trainer)

        def on_train_end(self, trainer: Any, _module: Any) -> None:
            self._settle(trainer)

        def _settle(self, trainer: Any) -> None:
            if self.is_due:
                self.is_due = False
                host.offers.offer(dict(trainer.callback_metrics), newest(trainer))
                host.offers.settle()

    return Offering()


def _begin_epoch(trainer: Any, host: Host) -> None:
    """Let the batch change where an epoch begins, and count its batches again.

    Lightning has no public way to do so but to make the loader anew, which calls the user's code; so the count is set
    where `FitLoop.setup_data` sets it.
    """
    loader, combined = trainer.train_dataloader, getattr(trainer.fit_loop, "_combined_loader", None)
    interval, is_counted = trainer.val_check_interval, trainer.check_val_every_n_epoch is not None
    if combined is None or not hasattr(trainer, "val_check_batch"):
        host.hold_batch(UNKNOWN)
    elif trainer.reload_dataloaders_every_n_epochs:
        host.hold_batch(RELOADS)
    elif isinstance(interval, int) and is_counted and trainer.enable_validation:
        host.hold_batch(COUNTS_BATCHES)
    elif host.begin_epoch(loader):
        limit, length = trainer.limit_train_batches, len(loader)
        num_batches = min(length, limit) if isinstance(limit, int) else max(1, int(length * limit))
        combined.limits, trainer.fit_loop.max_batches = [num_batches], num_batches
        if isinstance(interval, float):
            trainer.val_check_batch = max(1, int(num_batches * interval))
