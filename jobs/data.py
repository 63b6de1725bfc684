"""Which samples a step trains on: exact, resumable sampling by global sample number.

The state is one number, the samples consumed since the start of training; from it and the seed follows every index,
whatever the batch sizes and rank counts were before. Each epoch is its own permutation of all samples; nothing is
padded, dropped or repeated. Knows nothing of data, devices or processes. Called by the training loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


_KEPT_BYTES = 128 << 20
_orders: dict[tuple[int, int, int], Indices] = {}
_lock = Lock()


def epoch_order(seed: int, epoch: int, num_samples: int) -> Indices:
    """The order in which an epoch visits samples 0..num_samples-1; read-only.

    Kept for whoever asks again, up to `_KEPT_BYTES` and four at least: several trials of one process are at different
    epochs, and making an order takes far longer than a step of a small model.
    """
    key = (seed, epoch, num_samples)
    with _lock:
        order = _orders.pop(key, None)
        if order is None:
            order = _made_order(seed, epoch, num_samples)
        _orders[key] = order  # the newest last
        while len(_orders) > 4 and sum(each.nbytes for each in _orders.values()) > _KEPT_BYTES:
            del _orders[next(iter(_orders))]
    return order


def _made_order(seed: int, epoch: int, num_samples: int) -> Indices:
    # Sorted raw bits and not Generator.permutation: numpy keeps bit streams the same for ever, but may change the
    # permutation drawn from them, and a resumed epoch must continue in the order in which it began.
    keys = np.random.PCG64([seed, epoch]).random_raw(num_samples)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCursor:
    """A place in the endless stream of samples. Commit the new cursor only after the optimizer step.

    Attributes:
        seed: of the permutations, >= 0.
        num_samples: samples per epoch, >= 1.
        position: samples consumed since the start of training, over all ranks and epochs.
        shuffle_block: None where an epoch is one permutation; otherwise samples are permuted within blocks of so many,
            which a stream can follow that is read from its beginning (1: in its own order).
        counts_epochs: whether numbers count through all epochs: sample `i` of epoch `e` is `e * num_samples + i`.
    """

    seed: int
    num_samples: int
    position: int = 0
    shuffle_block: int | None = None
    counts_epochs: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("seed", 0), ("num_samples", 1), ("position", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"sample cursor has {name}={getattr(self, name)}; allowed: >= {minimum}")
        if self.shuffle_block is not None and self.shuffle_block < 1:
            raise ValueError(f"sample cursor has shuffle_block={self.shuffle_block}; allowed: >= 1, or None")

    @property
    def epoch(self) -> int:
        """Whole passes done."""
        return self.position // self.num_samples

    @property
    def offset(self) -> int:
        """Samples consumed within the epoch."""
        return self.position % self.num_samples

    def take(self, count: int) -> tuple[Indices, SampleCursor]:
        """The next `count` sample numbers of all ranks together, and the cursor behind them.

        Raises:
            ValueError: `count` is negative.
        """
        if count < 0:
            raise ValueError(f"cannot take count={count} samples; allowed: >= 0")
        parts = []
        position, end = self.position, self.position + count
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            part = self._order_from(epoch, offset, end - position)[: end - position]
            parts.append(part + epoch * self.num_samples if self.counts_epochs else part)
            position += len(part)
        indices = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return indices, replace(self, position=end)

    def _order_from(self, epoch: int, offset: int, count: int) -> Indices:
        """The order of an epoch from `offset` on, `count` samples at least or as far as one permutation says it."""
        if self.shuffle_block is None:
            return epoch_order(self.seed, epoch, self.num_samples)[offset:]
        if self.shuffle_block == 1:
            return np.arange(offset, min(offset + count, self.num_samples), dtype=np.int64)
        block, inside = divmod(offset, self.shuffle_block)
        start = block * self.shuffle_block
        size = min(self.shuffle_block, self.num_samples - start)
        # Blocks of all epochs are numbered through, so that no two share a permutation.
        number = epoch * -(-self.num_samples // self.shuffle_block) + block
        return epoch_order(self.seed, number, size)[inside:] + start


def rank_slice(indices: Indices, rank: int, world_size: int) -> Indices:
    """The part of a global batch that one rank trains on; parts differ in length by at most one.

    Raises:
        ValueError: `rank` is not in [0, world_size).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} of world_size={world_size}; allowed: 0 <= rank < world_size")
    count = len(indices)
    return indices[count * rank // world_size : count * (rank + 1) // world_size]


def micro_batches(indices: Indices, micro_batch: int) -> list[Indices]:
    """A rank's part cut into pieces of `micro_batch`; the last one is shorter where it does not divide.

    Raises:
        ValueError: `micro_batch` is below 1.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}; allowed: >= 1")
    return [indices[start : start + micro_batch] for start in range(0, len(indices), micro_batch)]
