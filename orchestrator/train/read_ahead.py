"""Which samples a step takes, told to the job's reader a step ahead; and closing it when nobody asks any more.

What is told is advice: when a dial turns in between, other parts are asked for and those told are dropped. The cursor
alone decides which samples a step trains on. Knows no model and no step. Called by the stepper, and by whoever begins
trials.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.jobs.data import Indices, SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.job import Job
from orchestrator.policies.plan import Settings
from orchestrator.train.groups import Ranks


def first_cursor(job: Job, seed: int) -> SampleCursor:
    """The beginning of a trial; samples are shuffled as far as the job's reader can follow."""
    block = None if job.reader is None else job.reader.shuffle_block
    return SampleCursor(seed=seed, num_samples=job.num_train_samples, shuffle_block=block)


def take(job: Job, cursor: SampleCursor, settings: Settings, ranks: Ranks) -> tuple[Indices, SampleCursor]:
    """The samples of the next step of all ranks together, and the cursor behind them.

    The reader is told which parts this rank will ask for in this step and the next, as long as these settings hold.
    """
    taken = indices, after = cursor.take(settings.global_batch)
    if job.reader is not None:
        following, _ = after.take(settings.global_batch)
        job.reader.prefetch(
            [
                part
                for step in (indices, following)
                for part in micro_batches(rank_slice(step, ranks.rank, ranks.world_size), settings.micro_batch)
            ]
        )
    return taken


@contextlib.contextmanager
def reading(job: Job) -> Iterator[Job]:
    """The job, whose reader is closed at the end, however that comes."""
    try:
        yield job
    finally:
        if job.reader is not None:
            job.reader.close()
