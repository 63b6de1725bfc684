"""Which samples a step takes, told to the training's reader a step ahead; and closing it when nobody asks any more.

What is told is advice: when a dial turns in between, other parts are asked for and those told are dropped. The cursor
alone decides which samples a step trains on. Knows no model and no step. Called by the stepper, and by whoever begins
trials.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.jobs.data import Indices, SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.training import Training
from orchestrator.policies.plan import Settings
from orchestrator.train.groups import Ranks


def first_cursor(training: Training, seed: int) -> SampleCursor:
    """The beginning of a trial with that seed; samples are shuffled as far as the training's reader can follow."""
    training.open(seed)
    reader = training.reader
    return SampleCursor(
        seed=seed,
        num_samples=training.num_train_samples,
        shuffle_block=None if reader is None else reader.shuffle_block,
        counts_epochs=training.counts_epochs,
    )


def take(training: Training, cursor: SampleCursor, settings: Settings, ranks: Ranks) -> tuple[Indices, SampleCursor]:
    """The samples of the next step of all ranks together, and the cursor behind them.

    The reader is told which parts this rank will ask for in this step and the next, as long as these settings hold.
    """
    taken = indices, after = cursor.take(settings.global_batch)
    reader = training.reader
    if reader is not None:
        following, _ = after.take(settings.global_batch)
        reader.prefetch(
            [
                part
                for step in (indices, following)
                for part in micro_batches(rank_slice(step, ranks.rank, ranks.world_size), settings.micro_batch)
            ]
        )
    return taken


@contextlib.contextmanager
def reading(job: object) -> Iterator[Training]:
    """The training that a user's object declares; what reads its samples is closed at the end, however that comes."""
    training = Training.of(job)
    try:
        yield training
    finally:
        training.close()
