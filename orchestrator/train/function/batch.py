"""The batch dial of a user's function: the batch size of the DataLoader that it trains from.

A loader trains if it yields batches between a step and the next while gradients are on. Its batch sampler is read at
every batch, so that a new size is in the next one; loader processes that read ahead bring it some batches later. Only
torch's own `BatchSampler` is changed: others say what they want. Installed while a function runs, and removed then.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from orchestrator.control.orders import Grant
from orchestrator.errors import OutOfMemoryError
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits
from orchestrator.train.batch.guard import is_out_of_memory
from orchestrator.train.dials.dial import held_still

NO_LOADER = "no DataLoader"
ITERABLE = "iterable data"
OWN_SAMPLER = "a batch sampler of its own"
SCHEDULE = "its learning rate changes with every step, so that it counts steps"
SEVERAL = "it trains from several DataLoaders"
RANKS = "several ranks"
WATCH_STEPS = 8
"""Steps after which it is known from which loader a function trains, and whether a schedule counts steps."""


@dataclass(slots=True)
class _Seen:
    """One DataLoader: the batch size that its owner gave it, and what it yielded.

    Attributes:
        num_batches: since the last step.
        last: number of its last batch, counted over all loaders.
        sizes: samples in each batch that was not trained on yet.
    """

    sampler: BatchSampler | None
    batch_size: int | None
    why_off: str
    num_batches: int = 0
    last: int = 0
    sizes: deque[int] = field(default_factory=deque)


class Loaders:
    """Watches all DataLoaders of a function.

    Attributes:
        is_frozen: whether sizes may change only where a loader is begun anew, as at the start of an epoch.
        only: the loader that trains where the function has said which; others are not looked at.
    """

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[DataLoader[Any], _Seen] = weakref.WeakKeyDictionary()
        self._targets: weakref.WeakKeyDictionary[BatchSampler, int] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self.is_frozen = False
        self.only: DataLoader[Any] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch, within."""
        plain_iter, plain_batches = DataLoader.__iter__, BatchSampler.__iter__

        def watched(loader: DataLoader[Any]) -> Any:
            return self._watched(loader, plain_iter(loader))

        def batches(sampler: BatchSampler) -> Iterator[list[int]]:
            return self._batches(sampler) if sampler in self._targets else plain_batches(sampler)

        DataLoader.__iter__, BatchSampler.__iter__ = watched, batches  # type: ignore[method-assign]
        try:
            yield
        finally:
            DataLoader.__iter__, BatchSampler.__iter__ = plain_iter, plain_batches  # type: ignore[method-assign]

    def take(self) -> list[_Seen]:
        """The loaders that yielded batches since the last call; first the one of the last batch.

        That one trains: an evaluation whose loader is read with gradients on comes before.
        """
        used = [
            replace(seen)
            for loader, seen in self._seen.items()
            if seen.num_batches and (self.only is None or loader is self.only)
        ]
        used.sort(key=lambda seen: -seen.last)
        for seen in self._seen.values():
            seen.num_batches = 0
        for seen in used[1:]:
            seen.sizes.clear()
        return used

    def set_size(self, sampler: BatchSampler, batch_size: int) -> None:
        """Make batches of that size from the next one on; of a frozen loader from its next beginning on."""
        self._targets[sampler] = batch_size
        if not self.is_frozen:
            sampler.batch_size = batch_size

    def begin(self, sampler: BatchSampler) -> bool:
        """Give the sampler of a frozen loader its size now, before the loader is begun anew; True if it changed."""
        before, sampler.batch_size = sampler.batch_size, self._targets[sampler]
        return sampler.batch_size != before

    def _watched(self, loader: DataLoader[Any], batches: Iterator[Any]) -> Iterator[Any]:
        seen = self._seen.get(loader)
        if seen is None:
            seen = self._seen[loader] = _look_at(loader)
            if seen.sampler is not None:
                self._targets.setdefault(seen.sampler, seen.sampler.batch_size)
        seen.sizes.clear()
        return _Watched(batches, loader, seen, self._numbers)

    def _batches(self, sampler: BatchSampler) -> Iterator[list[int]]:
        """What `BatchSampler.__iter__` yields, with the batch size read anew for every batch."""
        sampler.batch_size = self._targets[sampler]
        samples = iter(sampler.sampler)
        while batch := [*itertools.islice(samples, sampler.batch_size)]:
            if len(batch) < sampler.batch_size and sampler.drop_last:
                return
            yield batch


class _Watched:
    """The iterator of a loader, which it keeps alive; counts what it yields while gradients are on."""

    def __init__(self, batches: Iterator[Any], loader: DataLoader[Any], seen: _Seen, numbers: Iterator[int]) -> None:
        self._batches, self._loader, self._seen, self._numbers = batches, loader, seen, numbers

    def __iter__(self) -> _Watched:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        if torch.is_grad_enabled():
            self._seen.num_batches += 1
            self._seen.last = next(self._numbers)
            self._seen.sizes.append(_size_of(batch) or self._seen.batch_size or 1)
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _size_of(batch: object) -> int:
    """Samples in a batch of any shape: the length of the first tensor in it; 0 where there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for part in parts if (size := _size_of(part))), 0)


def _look_at(loader: DataLoader[Any]) -> _Seen:
    sampler = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        return _Seen(sampler=None, batch_size=loader.batch_size, why_off=ITERABLE)
    if type(sampler) is not BatchSampler:
        size = getattr(sampler, "batch_size", loader.batch_size)
        return _Seen(sampler=None, batch_size=size if isinstance(size, int) else None, why_off=OWN_SAMPLER)
    return _Seen(sampler=sampler, batch_size=sampler.batch_size, why_off="")


class LoaderBatch:
    """The batch dial of a function.

    It is off until `WATCH_STEPS` steps have shown what the function trains from, and stays off where its batch cannot
    be changed. A user's accumulation is kept: the micro-batch is what changes.

    Attributes:
        own: the settings with the batch that the function has of its own.
        num_samples: samples that the last step was made of on all ranks, which are alike; 1 where no loader says.
    """

    name = "batch"

    def __init__(self, loaders: Loaders, start: Settings, *, num_ranks: int) -> None:
        self._loaders, self._num_ranks = loaders, num_ranks
        self._seen: _Seen | None = None
        self._num_steps = 0
        self._num_used = 2  # loaders that every step took batches from; above 1 is several
        self._num_ahead = 0  # batches that the loop fetches before it needs them
        self._newest: _Seen | None = None
        self._held = ""
        self.own = start
        self.num_samples = 1
        self.why_off = f"not known before step {WATCH_STEPS}"

    def limits(self, asked: DialLimits) -> DialLimits:
        """Micro-batches from 1 on; the number of micro-batches in a step is the function's own."""
        if self.why_off:
            return held_still(self.name, asked, self.own)
        accum, size = self.own.grad_accum, self.own.micro_batch
        most = min(asked.max_micro_batch, asked.max_global_batch // accum)
        least = -(-asked.min_global_batch // accum)
        return replace(
            asked,
            min_global_batch=min(least, size) * accum,
            max_global_batch=max(most, size) * accum,
            max_micro_batch=max(most, size),
            min_micro_batch=max(1, min(least, size)),
        )

    def prepare(self, asked: Settings) -> Settings:
        """As asked, if the number of micro-batches is the function's own; else the batch stays as it is."""
        if self.why_off or asked.grad_accum != self.own.grad_accum:
            return replace(asked, micro_batch=self.now, grad_accum=self.own.grad_accum)
        return asked

    def apply(self, grant: Grant, settings: Settings) -> None:  # noqa: ARG002
        """Make batches of that size from the next one on."""
        if self._seen is not None and self._seen.sampler is not None and not self.why_off:
            self._loaders.set_size(self._seen.sampler, settings.micro_batch)

    @property
    def now(self) -> int:
        """Samples in the next batch, as far as the sampler says."""
        sampler = None if self._seen is None else self._seen.sampler
        return self.own.micro_batch if sampler is None or self.why_off else sampler.batch_size

    def judge(self, error: Exception, settings: Settings) -> None:
        """Memory that ran out with a larger batch than the function's own is no fault of the function.

        Raises:
            OutOfMemoryError: it shall begin again with its own batch.
        """
        own, now = self.own, self.now
        if is_out_of_memory(error) and now > own.micro_batch:
            text = f"with a batch of {now}, where its own is {own.micro_batch}: {error}"
            settings = replace(settings, micro_batch=own.micro_batch, grad_accum=own.grad_accum)
            raise OutOfMemoryError(text, settings=settings) from error

    def hold(self, why: str) -> None:
        """The batch must not change in this training, for a reason that its library gives."""
        self._held = why

    def begin_epoch(self, loader: DataLoader[Any]) -> bool:
        """Give a frozen loader the size that was asked for, before it is begun anew; True if that is another one."""
        sampler = None if self._seen is None else self._seen.sampler
        is_ours = loader.batch_sampler is sampler and not self.why_off
        return is_ours and sampler is not None and self._loaders.begin(sampler)

    def stepped(self, *, num_backwards: int, counts_steps: Callable[[], bool]) -> bool:
        """Take note of one step; True when that settled what the function's own batch is, or whether it may change."""
        used = self._loaders.take()
        self._num_steps += 1
        self._num_used = min(self._num_used, len(used))
        num_batches = used[0].num_batches if used else 0
        self._newest = used[0] if used else self._newest
        is_news = self._num_steps == 1
        if is_news:
            self._seen = self._newest
            size = (used[0].batch_size or 1) if used else 1
            # A loop that fetches ahead has seen one batch more before its first step than it has trained on.
            self._set_accum(min(num_batches, num_backwards), size)
            self._num_ahead = max(0, num_batches - self.own.grad_accum)
        elif self._num_steps == 2 and num_batches not in {0, self.own.grad_accum}:
            self._set_accum(num_batches, self.own.micro_batch)  # several batches and one backward pass
            self._num_ahead, is_news = 0, True
        elif self._num_steps == WATCH_STEPS or (self._num_steps > WATCH_STEPS and self._held not in {"", self.why_off}):
            self.why_off, is_news = self._why(counts_steps=counts_steps()), True
        else:
            self._follow(used)
        self.num_samples = self._take_samples()
        return is_news

    def _set_accum(self, accum: int, size: int) -> None:
        self.own = replace(self.own, micro_batch=size, grad_accum=max(1, accum))

    def _take_samples(self) -> int:
        """Samples in the batches of the last step: all that were yielded, but for those fetched ahead; at least 1."""
        sizes = deque[int]() if self._newest is None else self._newest.sizes
        num_batches = max(len(sizes) - self._num_ahead, min(self.own.grad_accum, len(sizes)))
        return self._num_ranks * sum(sizes.popleft() for _ in range(num_batches)) or 1

    def label(self, settings: Settings) -> Settings:
        """The settings that the last step was made with: a larger batch than asked for where it was fetched ahead."""
        micro = -(-self.num_samples // (settings.grad_accum * self._num_ranks))
        return settings if micro <= settings.micro_batch else replace(settings, micro_batch=micro)

    def _follow(self, used: list[_Seen]) -> None:
        """A function that makes a new loader for each epoch: its batches are to have the size that was set before."""
        if not used or self.why_off or self._seen is None or used[0].sampler in {None, self._seen.sampler}:
            return
        size, self._seen = self.now, used[0]
        assert self._seen.sampler is not None
        self._loaders.set_size(self._seen.sampler, size)

    def _why(self, *, counts_steps: bool) -> str:
        if self._held:
            return self._held
        if self._seen is None:
            return NO_LOADER
        if self._seen.why_off:
            return self._seen.why_off
        if self._num_used > 1:
            return SEVERAL
        if self._num_ranks > 1:
            return RANKS
        return SCHEDULE if counts_steps else ""
