"""Samples that are not in memory: map-style data sets read by loader processes, and streams.

Both answer `fetch(indices)` with the samples of those numbers, in that order, and `prefetch(parts)` says what will
probably be asked next. What was prefetched and is not asked for is discarded, so batches and ranks may change at any
step, and a step that is done again gets the same samples. Which numbers those are is the cursor's business alone.
For jobs to use in `batch`, and to hand out as their `reader`; knows no model, rank or plan.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from orchestrator.jobs.data import Indices

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

_ORPHANED = 1
"""Exit status of a loader process whose parent is gone."""


class SampleReader(Protocol):
    """What reads samples while a trial trains, as the training loop sees it: told what is next, closed at the end."""

    @property
    def shuffle_block(self) -> int | None:
        """Samples that are shuffled among themselves, see `SampleCursor`; None where any order will do."""
        ...

    def prefetch(self, parts: Sequence[Sequence[int] | Indices]) -> None:
        """The parts that will probably be asked for next, in order; no promise."""
        ...

    def close(self) -> None:
        """Give up processes and open files. Samples may still be asked for afterwards."""
        ...


class MapDataset(Protocol[T_co]):
    """What torch calls a map-style data set: sample `i` is the same for ever."""

    def __len__(self) -> int:
        """Samples in it."""
        ...

    def __getitem__(self, index: Any, /) -> T_co:  # noqa: ANN401 - numbers, or pairs of them
        """Sample number `index`."""
        ...


_dataset: Any = None


def _open_dataset(dataset: Any) -> None:  # noqa: ANN401 - it crosses a process boundary
    """Give a loader process its copy of the data set, once."""
    global _dataset  # noqa: PLW0603 - a process has no other place to keep it
    _dataset = dataset
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed one cannot tell its loaders to leave."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(_ORPHANED)


Numbers = tuple[int | tuple[int, ...], ...]
"""What a data set is asked for: sample numbers, or whatever tuples of numbers it takes for one."""


def _read(numbers: Numbers) -> list[Any]:
    return [_dataset[number] for number in numbers]


def _numbers(part: Sequence[Any] | Indices) -> Numbers:
    return tuple(number if isinstance(number, tuple) else int(number) for number in part)


class MapLoader(Generic[T]):
    """Reads a map-style data set, in `num_processes` processes of its own or, with 0, in this one.

    Close it, or use it in a `with` block: processes that are left behind are a leak.
    """

    def __init__(self, dataset: MapDataset[T], *, num_processes: int = 0, keep: int = 16) -> None:
        """`keep` prefetched parts are held at most.

        Raises:
            ValueError: a number below its minimum.
        """
        if num_processes < 0 or keep < 1:
            raise ValueError(f"num_processes={num_processes}, keep={keep}; allowed: num_processes >= 0, keep >= 1")
        self._dataset, self._keep = dataset, keep
        self._tickets: OrderedDict[Numbers, Future[list[T]]] = OrderedDict()
        self._pool: ProcessPoolExecutor | None = None
        if num_processes:
            context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
            self._pool = ProcessPoolExecutor(num_processes, context, _open_dataset, (dataset,))

    @property
    def shuffle_block(self) -> int | None:
        """None: samples are read in any order."""
        return None

    def prefetch(self, parts: Sequence[Sequence[Any] | Indices]) -> None:
        """Begin to read what will probably be asked for next; what was begun and is not among it is discarded."""
        if self._pool is None:
            return
        wanted = [_numbers(part) for part in parts][: self._keep]
        for stale in self._tickets.keys() - set(wanted):
            self._tickets.pop(stale).cancel()
        for numbers in wanted:
            if numbers not in self._tickets:
                self._tickets[numbers] = self._pool.submit(_read, numbers)

    def fetch(self, indices: Sequence[Any] | Indices) -> list[T]:
        """The samples of those numbers, in that order; an error of the data set is raised here."""
        numbers = _numbers(indices)
        if self._pool is None:
            return [self._dataset[number] for number in numbers]
        ticket = self._tickets.pop(numbers, None) or self._pool.submit(_read, numbers)
        return ticket.result()

    def close(self) -> None:
        """End the loader processes; from here on this one reads."""
        self._tickets.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> MapLoader[T]:
        """The loader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class StreamReader(Generic[T]):
    """Reads samples by number from something that only runs forward. Every rank reads it, and keeps what is its own.

    Use it with a cursor whose `shuffle_block` is at most `window`. A number behind the window opens the stream anew:
    that is what a restart, or the beginning of an epoch, costs.
    """

    def __init__(self, open_at: Callable[[int], Iterator[T]], *, window: int = 4096) -> None:
        """`open_at(n)` is an iterator over samples n, n + 1, ...; a stream that cannot seek skips n of them.

        Raises:
            ValueError: `window` is below 1.
        """
        if window < 1:
            raise ValueError(f"window={window}; allowed: >= 1")
        self._open_at, self._window = open_at, window
        self._stream: Iterator[T] | None = None
        self._next = 0
        self._held: OrderedDict[int, T] = OrderedDict()

    @property
    def shuffle_block(self) -> int:
        """The window: what lies further apart is never asked for together."""
        return self._window

    def prefetch(self, parts: Sequence[Sequence[int] | Indices]) -> None:
        """Nothing: a stream is read as it comes."""

    def close(self) -> None:
        """Let go of the stream and of what was read; the next sample opens it anew."""
        self._stream = None
        self._held.clear()

    def fetch(self, indices: Sequence[int] | Indices) -> list[T]:
        """The samples of those numbers, in that order.

        Raises:
            IndexError: the stream ended before one of them.
        """
        return [self._sample(int(number)) for number in indices]

    def _sample(self, number: int) -> T:
        if number in self._held:
            return self._held[number]
        if self._stream is None or number < self._next:
            # A window before it, for what its block still needs.
            self._next = max(0, number - self._window)
            self._stream = self._open_at(self._next)
            self._held.clear()
        while self._next <= number:
            try:
                self._held[self._next] = next(self._stream)
            except StopIteration:
                raise IndexError(f"the stream ended at sample {self._next}, before sample {number}") from None
            except BaseException:
                self._stream = None  # what raised is at its end, and would say that the data are
                raise
            self._next += 1
            while len(self._held) > 2 * self._window:
                self._held.popitem(last=False)
        return self._held[number]
