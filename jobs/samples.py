"""The training samples of a declared training: PyTorch's data sets and loaders, read by sample number.

What a training returns from `train_data()` becomes `Samples`: batches by number, so that batch size and ranks may
change at any step and a resumed trial goes on with the next sample. Numbers count through all epochs: number `n` of a
data set of `N` samples is sample `n % N` in epoch `n // N`. Each draws its random numbers (augmentation) from
generators seeded by the trial's seed and that number, whoever reads it and in whatever batch.
Knows no model, rank or plan; called by `jobs.training`.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from orchestrator.jobs.data import Indices
from orchestrator.jobs.loading import MapLoader
from orchestrator.jobs.own import UserCodeError

logger = logging.getLogger(__name__)

ENDLESS = 1 << 62
"""Samples of an epoch of a stream whose length is not known."""

_EVAL_BATCH = 64
"""Samples per forward pass where `eval_data()` returns a data set and no loader."""

Collate = Callable[[list[Any]], Any]


class Samples(Protocol):
    """Training samples by number."""

    @property
    def num_samples(self) -> int:
        """Samples per epoch; `ENDLESS` where that is not known."""
        ...

    @property
    def shuffle_block(self) -> int | None:
        """None where an epoch is one permutation, 1 where samples are read in their own order; see `SampleCursor`."""
        ...

    def batch(self, numbers: Sequence[int] | Indices, device: torch.device) -> Any:  # noqa: ANN401 - the user's
        """The samples of those numbers, collated, on `device`."""
        ...

    def prefetch(self, parts: Sequence[Sequence[int] | Indices]) -> None:
        """The parts that will probably be asked for next, in order; no promise."""
        ...

    def close(self) -> None:
        """Give up processes and open files."""
        ...


def samples_of(data: object, seed: int, owner: str) -> Samples:
    """What `train_data()` of `owner` returned, as samples by number.

    Raises:
        UserCodeError: it is no data set and no loader, or one without samples.
    """
    loader = data if isinstance(data, DataLoader) else None
    dataset = data if loader is None else loader.dataset
    collate: Collate = default_collate if loader is None or loader.batch_size is None else loader.collate_fn
    num_processes = 0 if loader is None else loader.num_workers
    if isinstance(dataset, IterableDataset):
        return StreamSamples(dataset, collate, num_processes, seed)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UserCodeError(
            f"{owner}.train_data() returned {type(data).__name__}; allowed: a Dataset with __len__ and __getitem__, an"
            " IterableDataset, or a DataLoader over one of them"
        )
    order = None if loader is None else _order_of(loader, seed)
    size = len(dataset) if order is None else len(order)
    if size < 1:
        raise UserCodeError(f"{owner}.train_data() returned {type(data).__name__} without samples; allowed: at least 1")
    return MapSamples(dataset, collate, num_processes, seed, order)


class Order:
    """The order of each epoch as a sampler of the user's draws it, from generators seeded by the epoch."""

    def __init__(self, sampler: Any, seed: int, *, is_batched: bool) -> None:  # noqa: ANN401 - any iterable of numbers
        self._sampler, self._seed, self._is_batched = sampler, seed, is_batched
        self._drawn = lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self._drawn(0))

    def __getitem__(self, number: int) -> int:
        """The sample that is the `number`th of all epochs."""
        epoch, offset = divmod(number, len(self))
        order = self._drawn(epoch)
        return order[offset % len(order)]

    def _draw(self, epoch: int) -> list[int]:
        with seeded(self._seed, ENDLESS + epoch):
            generator = getattr(self._sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(_mixed(self._seed, epoch))
            if hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(epoch)
            drawn = list(self._sampler)
        return [int(n) for part in drawn for n in part] if self._is_batched else [int(n) for n in drawn]


def _order_of(loader: DataLoader[Any], seed: int) -> Order | None:
    """The order that a loader asks for; None for one permutation per epoch, which needs none."""
    batch_sampler = loader.batch_sampler
    if batch_sampler is not None and type(batch_sampler) is not BatchSampler:
        return Order(batch_sampler, seed, is_batched=True)
    sampler = loader.sampler
    is_plain = isinstance(sampler, RandomSampler) and not sampler.replacement
    if is_plain and getattr(sampler, "num_samples", None) == len(loader.dataset):  # type: ignore[arg-type]
        return None
    return Order(sampler, seed, is_batched=False)


class _Item:
    """A map-style data set by number through all epochs. Crosses to loader processes, so it holds plain values only."""

    def __init__(self, dataset: Any, size: int, seed: int) -> None:  # noqa: ANN401 - the user's
        self._dataset, self._size, self._seed = dataset, size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: tuple[int, int]) -> Any:  # noqa: ANN401 - the user's
        number, index = key
        with seeded(self._seed, number):
            return self._dataset[index]


class MapSamples:
    """A data set with `__getitem__`, read in processes of the loader's or in this one."""

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - the user's
        collate: Collate,
        num_processes: int,
        seed: int,
        order: Order | None,
    ) -> None:
        self._dataset, self._collate, self._seed, self._order = dataset, collate, seed, order
        self._size, self._is_still = len(dataset), _draws_nothing(dataset)
        self._loader: MapLoader[Any] | None = None
        if num_processes and not _is_told_to_stay(dataset, num_processes):
            self._loader = MapLoader(_Item(dataset, self._size, seed), num_processes=num_processes)

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return self._size if self._order is None else len(self._order)

    @property
    def shuffle_block(self) -> int | None:
        """The cursor's permutation, unless the loader has an order of its own."""
        return None if self._order is None else 1

    def batch(self, numbers: Sequence[int] | Indices, device: torch.device) -> Any:  # noqa: ANN401 - the user's
        """Read, collate and move to the device."""
        keys = self._keys(numbers)
        samples = self._read(keys) if self._loader is None else self._loader.fetch(keys)
        return moved(self._collate(samples), device)

    def prefetch(self, parts: Sequence[Sequence[int] | Indices]) -> None:
        """Let the loader processes begin."""
        if self._loader is not None:
            self._loader.prefetch([self._keys(part) for part in parts])

    def close(self) -> None:
        """End the loader processes."""
        if self._loader is not None:
            self._loader.close()

    def _keys(self, numbers: Sequence[int] | Indices) -> list[Any]:
        found = [int(number) for number in numbers]
        if self._order is None:
            return [(number, number % self._size) for number in found]
        return [(number, self._order[number]) for number in found]

    def _read(self, keys: list[tuple[int, int]]) -> list[Any]:
        if self._is_still:  # seeding takes longer than reading such a sample
            return [self._dataset[index] for _, index in keys]
        samples = []
        with kept_generators():
            for number, index in keys:
                seed_all(self._seed, number)
                samples.append(self._dataset[index])
        return samples


class StreamSamples:
    """An `IterableDataset`, read forward; it is opened anew where it ends, which begins another epoch.

    Every rank reads it and keeps what is its own. A resumed trial skips what was used: with `skip(n)` of the data set
    where it has one, as those of Hugging Face do, otherwise by reading.
    """

    shuffle_block = 1

    def __init__(self, dataset: IterableDataset[Any], collate: Collate, num_processes: int, seed: int) -> None:
        self._dataset, self._collate, self._seed = dataset, collate, seed
        self._num_processes = 0 if num_processes and _is_told_to_stay(dataset, num_processes) else num_processes
        self._stream: Iterator[Any] | None = None
        self._held: dict[int, Any] = {}
        self._next = self._first = 0
        self._length: int | None = len(dataset) if hasattr(dataset, "__len__") else None

    @property
    def num_samples(self) -> int:
        """The data set's own length, where it has one."""
        return self._length or ENDLESS

    def batch(self, numbers: Sequence[int] | Indices, device: torch.device) -> Any:  # noqa: ANN401 - the user's
        """Read on as far as the last of the numbers, collate and move to the device."""
        with kept_generators():
            samples = [self._sample(int(number)) for number in numbers]
        return moved(self._collate(samples), device)

    def prefetch(self, parts: Sequence[Sequence[int] | Indices]) -> None:
        """Forget what lies before all of these."""
        self._first = min((int(part[0]) for part in parts if len(part)), default=0)
        for number in [number for number in self._held if number < self._first]:
            del self._held[number]

    def close(self) -> None:
        """Let go of the stream, its processes, and what was read."""
        self._stream = None
        self._held.clear()

    def _sample(self, number: int) -> Any:  # noqa: ANN401 - the user's
        if number in self._held:
            return self._held[number]
        if self._stream is None or number < self._next:
            self._next = min(self._first, number)
            self._stream = self._opened_at(self._next)
            self._held.clear()
        value = None
        while self._next <= number:
            seed_all(self._seed, self._next)
            try:
                value = next(self._stream)
            except BaseException:
                self._stream = None  # what raised is at its end, and would say that the data are
                raise
            if self._next >= self._first:
                self._held[self._next] = value
            self._next += 1
        return value

    def _opened_at(self, number: int) -> Iterator[Any]:
        """Samples from `number` on, for ever."""
        epoch, skipped = 0, 0
        if self._length:
            epoch, number = divmod(number, self._length)
        dataset: Any = self._dataset
        if number and hasattr(dataset, "skip"):
            dataset, skipped, number = dataset.skip(number), number, 0
        while True:
            count = 0
            for value in self._epoch(dataset, epoch):
                count += 1
                if count > number:
                    yield value
            self._check(count + skipped)
            epoch, number = epoch + 1, max(0, number - count)
            dataset, skipped = self._dataset, 0

    def _epoch(self, dataset: Any, epoch: int) -> Iterator[Any]:  # noqa: ANN401 - the user's
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        if not self._num_processes:
            yield from dataset
            return
        generator = torch.Generator().manual_seed(_mixed(self._seed, ENDLESS + epoch))
        yield from DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._num_processes,
            generator=generator,
            multiprocessing_context="spawn",  # a fork would copy the locks of torch's threads
        )

    def _check(self, count: int) -> None:
        """Refuse an epoch that is empty or not as long as was said.

        Raises:
            UserCodeError: it is.
        """
        name = type(self._dataset).__name__
        if not count:
            raise UserCodeError(f"{name} of train_data() yielded no sample; allowed: at least 1 per epoch")
        if self._length not in {None, count}:
            raise UserCodeError(
                f"{name} of train_data() has __len__ {self._length} and yielded {count} samples; allowed: as many as it"
                " says; with workers each yields its own part (torch.utils.data.get_worker_info), or leave __len__ out"
            )


def eval_batches(data: object, owner: str) -> Iterator[Any]:
    """The batches of what `eval_data()` of `owner` returned, in their order.

    Raises:
        UserCodeError: it is no data set and no loader.
    """
    if isinstance(data, DataLoader):
        yield from data
    elif isinstance(data, IterableDataset):
        stream = iter(data)
        while samples := list(islice(stream, _EVAL_BATCH)):
            yield default_collate(samples)
    elif isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        size = len(data)
        for start in range(0, size, _EVAL_BATCH):
            yield default_collate([data[n] for n in range(start, min(size, start + _EVAL_BATCH))])
    else:
        raise UserCodeError(
            f"{owner}.eval_data() returned {type(data).__name__}; allowed: a Dataset, an IterableDataset or a"
            " DataLoader"
        )


def moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - the user's
    """A batch on `device`: its tensors, in tuples, lists, mappings and whatever else has a method `to`."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(each, device) for each in value)
    if hasattr(value, "to"):  # tensors, and the batches of tokenizers
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    return value


def size_of(value: Any) -> int | None:  # noqa: ANN401 - the user's
    """Samples in a batch: the first dimension of its first tensor, None where it has none."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for found in map(size_of, parts) if found is not None), None)


def seed_all(seed: int, number: int) -> None:
    """Seed the generators of torch (host), Python and numpy by a trial's seed and a sample's number."""
    mixed = _mixed(seed, number)
    torch.default_generator.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the generators of torch (host), Python and numpy back afterwards."""
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


@contextmanager
def seeded(seed: int, number: int) -> Iterator[None]:
    """Draw from generators seeded by `seed_all` within, and put them back afterwards."""
    with kept_generators():
        seed_all(seed, number)
        yield


def _mixed(seed: int, number: int) -> int:
    """A number of 63 bits from two, by the mixing function of SplitMix64 (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1


def _draws_nothing(dataset: object) -> bool:
    """Whether a data set is known to draw no random numbers when it is read."""
    if type(dataset) is Subset:
        return _draws_nothing(dataset.dataset)
    return type(dataset) in {TensorDataset, list, tuple}


def _is_told_to_stay(dataset: object, num_processes: int) -> bool:
    """Whether a data set cannot be sent to loader processes, which is said."""
    try:
        pickle.dumps(dataset)
    except Exception as error:  # whatever the user's classes raise
        logger.warning(
            "samples are read in the training process and not in %d workers: the data set cannot be pickled (%s: %s)",
            num_processes,
            type(error).__name__,
            error,
        )
        return True
    return False
