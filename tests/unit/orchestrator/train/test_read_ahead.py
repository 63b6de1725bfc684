"""Jobs whose samples are read while they train: told ahead, closed at the end, exact over a resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchestrator.control.orders import SlotOrder, Status, StopMode
from orchestrator.jobs import build_job
from orchestrator.jobs.data import Indices, SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.job import Job, LossTerms
from orchestrator.jobs.mlp import MlpJob
from orchestrator.jobs.training import Training
from orchestrator.train.groups import Ranks
from orchestrator.train.read_ahead import reading, take
from tests.unit.orchestrator.train.links import Script, grant, loop, order, settings


class Told:
    """A reader that remembers."""

    shuffle_block = None

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.is_closed = False

    def prefetch(self, parts: Sequence[Sequence[int] | Indices]) -> None:
        self.parts = [list(part) for part in parts]

    def close(self) -> None:
        self.is_closed = True


class ReadingJob(MlpJob):
    """Keeps what it was told and asked for."""

    def __init__(self) -> None:
        super().__init__(width=16, num_samples=512)
        self.reader = self.told = Told()
        self.asked: list[list[int]] = []
        self.foretold: list[list[list[int]]] = []

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        self.asked.append(list(indices))
        self.foretold.append(self.told.parts)
        return super().batch(indices, device)


class BrokenJob(ReadingJob):
    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        raise ValueError("no loss")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_parts_of_this_step_and_the_next_are_told_for_each_rank(rank: int) -> None:
    job = ReadingJob()
    cursor = SampleCursor(seed=1, num_samples=512, position=500)
    ranks = Ranks(rank=rank, world_size=2, device=torch.device("cpu"))
    taken, after = take(Training.of(job), cursor, settings(micro_batch=3, grad_accum=2, num_workers=2), ranks)
    assert (taken.tolist(), after.position) == (cursor.take(12)[0].tolist(), 512)
    expected: list[list[int]] = []
    for _ in range(2):
        indices, cursor = cursor.take(12)
        expected += [part.tolist() for part in micro_batches(rank_slice(indices, rank, 2), 3)]
    assert job.told.parts == expected


def test_every_part_of_a_trial_was_told_a_step_before_but_where_a_dial_turned(tmp_path: Path) -> None:
    first = order(tmp_path)
    script = Script(first)
    script.at(9, lambda now: replace(now, grant=grant(2, micro_batch=4, grad_accum=2)))
    job = ReadingJob()
    assert loop(script, job).run().status is Status.DONE
    untold = [n for n in range(1, len(job.asked)) if job.asked[n] not in job.foretold[n - 1]]
    assert untold == [9], "the first part after the change alone"


@pytest.mark.parametrize("kind", [ReadingJob, BrokenJob])
def test_a_reader_is_closed_however_a_trial_ends(tmp_path: Path, kind: type[ReadingJob]) -> None:
    job = kind()

    def run() -> None:
        with reading(job) as opened:
            assert loop(Script(order(tmp_path)), opened).run().status is Status.DONE

    if kind is BrokenJob:
        with pytest.raises(ValueError, match="no loss"):
            run()
    else:
        run()
    assert job.told.is_closed


def streaming(first: SlotOrder) -> Job:
    assert first.trial is not None
    torch.manual_seed(first.trial.seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    return job


def test_a_trial_on_a_stream_goes_on_bit_equal_after_a_stop_and_sees_each_sample_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(32 + (i * i + i // 7) % 90 for i in range(7000)))
    sizes = {"width": 16, "layers": 1, "heads": 2, "context": 16, "eval_windows": 8, "shuffle_block": 32}
    first = order(tmp_path / "a", samples_per_report=200)
    assert first.trial is not None
    params = {**sizes, "data_dir": str(tmp_path / "text.txt")}
    first = replace(first, trial=replace(first.trial, job="language", params=params))
    undisturbed = Script(first)
    assert loop(undisturbed, streaming(first)).run().status is Status.DONE

    assert first.trial is not None
    begun = replace(first, trial=replace(first.trial, directory=str(tmp_path / "b")))
    script = Script(begun)
    script.at(11, lambda now: replace(now, stop=StopMode.CHECKPOINT))  # in the middle of a block
    outcome = loop(script, streaming(begun)).run()
    assert outcome.status is Status.INTERRUPTED
    assert begun.trial is not None
    again = replace(begun, trial=replace(begun.trial, attempt=1, resume_from=outcome.checkpoint))
    rest = Script(again)
    assert loop(rest, streaming(again)).run().status is Status.DONE
    losses = [*script.records["loss"], *rest.records["loss"]]
    assert losses == list(undisturbed.records["loss"])
