"""Text that stays on disk: the same windows as in memory, in any order a cursor asks for, and files that fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.corpus import files_of, is_held_out
from orchestrator.jobs.data import SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.language import LanguageJob

CPU = torch.device("cpu")
SIZE = 17


def small(data_dir: Path, **params: object) -> LanguageJob:
    sizes = {"width": 16, "layers": 1, "heads": 2, "context": SIZE - 1}
    job = build_job("language", {**sizes, "data_dir": str(data_dir), **params})
    assert isinstance(job, LanguageJob)
    job.prepare()
    return job


@pytest.fixture
def copy(source_dir: Path, tmp_path: Path) -> Path:
    """The folder of text, to be spoilt."""
    return Path(shutil.copytree(source_dir, tmp_path / "copy"))


@pytest.mark.parametrize("limit", [None, 1000])
def test_windows_and_held_out_text_are_those_of_the_text_in_memory(source_dir: Path, limit: int | None) -> None:
    memory, stream = small(source_dir, max_bytes=limit), small(source_dir, max_bytes=limit, shuffle_block=8)
    assert memory.reader is None
    assert stream.reader is not None
    assert stream.reader.shuffle_block == 8
    assert stream.num_train_samples == memory.num_train_samples
    assert torch.equal(stream.text.held_out, memory.text.held_out)
    numbers = list(range(stream.num_train_samples))
    for read, expected in zip(stream.batch(numbers, CPU), memory.batch(numbers, CPU), strict=True):
        assert torch.equal(read, expected)
    assert [len(part) for part in stream.batch([], CPU)] == [0, 0]


@pytest.mark.parametrize("is_folder", [False, True])
def test_of_a_single_file_the_end_is_held_out(tmp_path: Path, is_folder: bool) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 251)) * 4)
    path = tmp_path if is_folder else tmp_path / "book.txt"
    memory, stream = small(path), small(path, shuffle_block=4)
    assert torch.equal(stream.text.held_out, memory.text.held_out)
    assert stream.num_train_samples == memory.num_train_samples == 949 // SIZE
    assert torch.equal(stream.batch([54, 3, 0], CPU)[0], memory.batch([54, 3, 0], CPU)[0])


def test_each_window_of_an_epoch_once_over_changes_of_batch_and_ranks_and_a_restart(source_dir: Path) -> None:
    memory = small(source_dir)
    num_samples = memory.num_train_samples
    cursor = SampleCursor(seed=5, num_samples=num_samples, shuffle_block=16)
    seen: list[int] = []
    for number, (global_batch, num_ranks) in enumerate([(8, 1), (24, 2), (5, 1), (40, 3)] * 40):
        if number % 7 == 0:  # a restart: every rank begins anew, in the middle of a block
            ranks = [small(source_dir, shuffle_block=16) for _ in range(3)]
        left = num_samples - cursor.position
        indices, cursor = cursor.take(min(global_batch, left))
        for rank in range(num_ranks):
            for part in micro_batches(rank_slice(indices, rank, num_ranks), 4):
                assert torch.equal(ranks[rank].batch(part, CPU)[0], memory.batch(part, CPU)[0])
                seen += part.tolist()
        if not left:
            break
    assert sorted(seen) == list(range(num_samples))


def test_a_file_that_is_no_text_is_named_or_left_out(
    source_dir: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = small(source_dir, shuffle_block=8).num_train_samples
    (copy / "bad.bin").write_bytes(b"x" * 100 + b"\0")
    with pytest.raises(ValueError, match=r"bad\.bin cannot be read: it is not text: byte 100 is zero"):
        small(copy, shuffle_block=8)
    assert small(copy, shuffle_block=8, on_bad_file="skip").num_train_samples == expected
    assert "1 of 61 files below" in caplog.text


def test_a_file_that_changes_under_a_trial_is_named(copy: Path) -> None:
    job = small(copy, shuffle_block=8)
    path = copy / next(path for path in files_of(str(copy))[1] if not is_held_out(path))
    path.write_text("short")
    with pytest.raises(ValueError, match=rf"{path} has become shorter"):
        job.batch([0], CPU)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} could be read when this trial began and cannot now"):
        job.batch([0], CPU)


def test_a_reader_that_is_closed_goes_on_where_it_is_asked_to(source_dir: Path) -> None:
    job = small(source_dir, shuffle_block=8)
    first = job.batch([2, 1], CPU)[0]
    assert job.reader is not None
    job.reader.close()
    assert torch.equal(job.batch([2, 1], CPU)[0], first)
