"""A broken file in a folder of data, for every layout that a job reads: named, and the end of the trial or left out."""

from __future__ import annotations

import io
import logging
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.folder import is_held_out
from orchestrator.jobs.job import Job


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A folder that one job reads.

    Attributes:
        job: name of the job.
        write: writes a good folder.
        bad: path of one more file, below the folder.
        content: what it holds that makes it broken.
        params: of the job.
    """

    job: str
    write: Callable[[Path], None]
    bad: str
    content: bytes
    params: dict[str, Any] = field(default_factory=dict)


def text(root: Path) -> None:
    for i in range(60):
        (root / f"{i}.txt").write_text(f"line {i} of some text\n" * 8)


def fasta(root: Path) -> None:
    draw = np.random.default_rng(0)
    for name, letters in (("negative.fa", "AATTCG"), ("positive.fa", "GGCCAT")):
        lines = [f">{i}\n{''.join(draw.choice(list(letters), 16))}\n" for i in range(40)]
        (root / name).write_text("".join(lines))


def png(number: int, channels: int = 3) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    values = np.random.default_rng(number).integers(0, 256, (20, 24, channels)).astype(np.uint8)
    stream = io.BytesIO()
    image.fromarray(values if channels > 1 else values[:, :, 0]).save(stream, format="PNG")
    return stream.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def classes(root: Path) -> None:
    for part in ("train", "val"):
        for name in "ab":
            for i in range(3):
                put(root / part / name / f"{i}.png", png(i))


def pairs(root: Path) -> None:
    for i in range(20):
        put(root / "images" / f"p{i}.png", png(i))
        put(root / "masks" / f"p{i}.png", png(i, channels=1))


def sound(number: int = 0) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(8000)
        opened.writeframes((np.random.default_rng(number).standard_normal(3200) * 3000).astype("<i2").tobytes())
    return stream.getvalue()


SPEAKERS = [*range(100, 112), next(i for i in range(100, 400) if is_held_out(str(i), 26))]


def commands(root: Path) -> None:
    for speaker in SPEAKERS:
        for word in ("yes", "no"):
            put(root / word / f"{speaker}_nohash_0.wav", sound(speaker))


def librispeech(root: Path) -> None:
    for speaker in SPEAKERS:
        put(root / f"{speaker}" / "1" / f"{speaker}-1.trans.txt", f"{speaker}-1-0 GO ON\n".encode())
        put(root / f"{speaker}" / "1" / f"{speaker}-1-0.wav", sound(speaker))


def librispeech_with_one_more(root: Path) -> None:
    librispeech(root)
    put(root / "100" / "2" / "100-2.trans.txt", b"100-2-0 STOP\n")


def cifar(root: Path) -> None:
    for name in ("data_batch_1.bin", "test_batch.bin"):
        rows = np.random.default_rng(0).integers(0, 10, (4, 3073)).astype(np.uint8)
        put(root / name, rows.tobytes())


TEXT = {"context": 16, "width": 16, "heads": 2}
SIZED = {"width": 16, "heads": 2, "patch": 4, "size": 8}
SPEECH = {"width": 16, "heads": 2, "units": "letters"}
LAYOUTS = {
    "text": Layout(job="language", write=text, bad="x.bin", content=b"ab\0", params=TEXT),
    "text that stays on disk": Layout(
        job="language", write=text, bad="x.bin", content=b"ab\0", params={**TEXT, "shuffle_block": 4}
    ),
    "class folders": Layout(job="image", write=classes, bad="train/a/x.png", content=b"torn", params=SIZED),
    "class folders, truncated": Layout(job="image", write=classes, bad="val/a/x.png", content=png(1)[:-400]),
    "class folders that stay on disk": Layout(
        job="image", write=classes, bad="train/a/x.png", content=b"torn", params={**SIZED, "loader_processes": 1}
    ),
    "cifar": Layout(job="image", write=cifar, bad="data_batch_2.bin", content=b"torn"),
    "pictures and masks": Layout(job="tissue", write=pairs, bad="images/x.png", content=b"torn", params={"size": 16}),
    "speech commands": Layout(job="speech", write=commands, bad="no/100_nohash_1.wav", content=sound()[:-9]),
    "librispeech": Layout(
        job="speech", write=librispeech_with_one_more, bad="100/2/100-2-0.wav", content=b"RIFF", params=SPEECH
    ),
    "librispeech, transcript": Layout(
        job="speech", write=librispeech, bad="100/2/100-2.trans.txt", content=b"100-2-0\n", params=SPEECH
    ),
}


def built(layout: Layout, root: Path, **changes: str) -> Job:
    job = build_job(layout.job, {**layout.params, "data_dir": str(root), **changes})
    job.prepare()
    return job


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_broken_file_is_named_and_stops_or_is_left_out(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    put(tmp_path / layout.bad, layout.content)
    if layout.job == "tissue":
        put(tmp_path / "masks" / "x.png", png(0, channels=1))
    with pytest.raises(ValueError, match=rf"{layout.bad} cannot be read: .*on_bad_file=skip"):
        built(layout, tmp_path)
    for _ in range(2):  # a later trial of the process gets the data from memory, and is told all the same
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            job = built(layout, tmp_path, on_bad_file="skip")
        assert f"left out {tmp_path / layout.bad}: " in caplog.text
        assert " files below " in caplog.text
    (tmp_path / layout.bad).unlink()
    assert job.num_train_samples > 0
    model = job.build_model()
    assert torch.isfinite(job.loss(model, job.batch([0], torch.device("cpu"))).loss_sum)
    if job.reader is not None:
        job.reader.close()


def test_a_broken_fasta_file_is_named_and_its_good_records_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fasta(tmp_path)
    path = tmp_path / "positive.fa"
    path.write_text(path.read_text() + ">odd\nAC!T\n")
    layout = Layout(job="genome", write=fasta, bad="positive.fa", content=b"", params={"length": 16})
    with pytest.raises(ValueError, match=r"positive\.fa cannot be read: record 'odd' \(line 81\)"):
        built(layout, tmp_path)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            job = built(layout, tmp_path, on_bad_file="skip")
        assert "left out record 'odd'" in caplog.text
        assert 40 < job.num_train_samples < 80


def test_lists_of_speech_commands_that_are_no_text_are_named(tmp_path: Path) -> None:
    commands(tmp_path)
    (tmp_path / "validation_list.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"validation_list\.txt cannot be read: "):
        built(LAYOUTS["speech commands"], tmp_path)
