"""Pictures that stay on disk: the same samples as in memory, from loader processes, and files that are broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.data import SampleCursor, micro_batches, rank_slice
from orchestrator.jobs.image import ImageJob

CPU = torch.device("cpu")
NAMES = [f"{part}/{name}/{i}.png" for part, count in (("train", 15), ("val", 4)) for name in "ab" for i in range(count)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise."""
    root = tmp_path_factory.mktemp("pictures")
    write(root, NAMES)
    return root


def write(root: Path, names: list[str]) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(root / name)


def job_of(root: Path, **params: object) -> ImageJob:
    sizes = {"width": 16, "layers": 1, "heads": 2, "patch": 4, "size": 8}
    job = build_job("image", {**sizes, "data_dir": str(root), **params})
    assert isinstance(job, ImageJob)
    return job


def test_samples_and_evaluation_are_those_of_pictures_in_memory(pictures: Path) -> None:
    memory, disk = job_of(pictures, eval_samples=5), job_of(pictures, eval_samples=5, loader_processes=1)
    for job in (memory, disk):
        job.prepare()
    assert memory.reader is None
    assert disk.reader is not None
    assert disk.reader.shuffle_block is None
    disk.reader.close()  # from here on this process reads, which is all that this test needs
    assert disk.num_train_samples == memory.num_train_samples == 30
    for read, expected in zip(disk.batch(range(30), CPU), memory.batch(range(30), CPU), strict=True):
        assert torch.equal(read, expected)
    torch.manual_seed(0)
    model = memory.build_model()
    assert disk.evaluate(model, CPU) == memory.evaluate(model, CPU)


def test_loader_processes_read_each_picture_of_an_epoch_once_over_changes_of_batch_and_ranks(pictures: Path) -> None:
    memory = job_of(pictures)
    cursor = SampleCursor(seed=2, num_samples=30)
    seen: list[int] = []
    job = job_of(pictures, loader_processes=2)
    job.prepare()
    assert job.reader is not None
    for global_batch, num_ranks in ((6, 1), (10, 2), (4, 1), (10, 2)):
        indices, after = cursor.take(global_batch)
        told, _ = cursor.take(6)  # what was told of is asked for only as long as nothing turns
        job.reader.prefetch(micro_batches(told, 3))
        for rank in range(num_ranks):
            for part in micro_batches(rank_slice(indices, rank, num_ranks), 3):
                for read, expected in zip(job.batch(part, CPU), memory.batch(part, CPU), strict=True):
                    assert torch.equal(read, expected)
                seen += part.tolist()
        cursor = after
    job.reader.close()
    assert sorted(seen) == list(range(30))


def test_a_part_of_the_pictures_has_all_classes(pictures: Path) -> None:
    for processes in (0, 1):
        job = job_of(pictures, max_samples=6, loader_processes=processes)
        assert sorted(job.batch(range(6), CPU)[1].tolist()) == [0, 0, 0, 1, 1, 1]
        if job.reader is not None:
            job.reader.close()


def test_a_broken_picture_is_named_or_left_out_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/4.png"])
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"train/a/bad\.png cannot be read: .*on_bad_file=skip"):
        job_of(tmp_path, loader_processes=1).prepare()
    assert job_of(tmp_path, loader_processes=1, on_bad_file="skip").num_train_samples == 2
    assert "left out" in caplog.text
    assert "train/a/bad.png" in caplog.text


def test_a_picture_that_proves_broken_later_is_named_and_stops_or_counts_without_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/4.png"])
    stops, skips = (job_of(tmp_path, loader_processes=1, on_bad_file=word) for word in ("stop", "skip"))
    for job in (stops, skips):
        job.prepare()
        assert job.reader is not None
    torn = tmp_path / "train" / "a" / "1.png"
    torn.write_bytes(torn.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"train/a/1\.png cannot be read: .*on_bad_file=skip"):
        stops.batch([0, 1], CPU)
    model = skips.build_model()
    both, good = (skips.loss(model, skips.batch(numbers, CPU)) for numbers in ([0, 1], [1]))
    assert both.num_elements == skips.num_elements(2)
    assert both.loss_sum.item() == pytest.approx(good.loss_sum.item(), rel=1e-5)
    skips.batch([0], CPU)
    assert caplog.text.count("train/a/1.png cannot be decoded: it counts as a sample without loss") == 1
    for job in (stops, skips):
        assert job.reader is not None
        job.reader.close()


def test_loader_processes_end_with_a_process_that_is_killed(pictures: Path) -> None:
    code = f"""
import sys, time
from orchestrator.jobs import build_job
job = build_job("image", {{"data_dir": {str(pictures)!r}, "size": 8, "loader_processes": 1}})
job.prepare()
job.batch([0], __import__("torch").device("cpu"))
print("read", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "read\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=30)
    for child in alive:
        child.kill()
    assert not alive
