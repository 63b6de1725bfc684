"""The language job's text, windows and sizes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.corpus import SKIPPED_FOLDERS, files_of, is_held_out, load_corpus, source_files, standard_library
from orchestrator.jobs.language import ByteGpt, LanguageJob

CPU = torch.device("cpu")
README = Path(__file__).parents[3] / "jobs" / "README.md"


def small(source_dir: Path, **params: object) -> LanguageJob:
    job = build_job(
        "language", {"width": 16, "layers": 1, "heads": 2, "context": 16, "data_dir": str(source_dir), **params}
    )
    assert isinstance(job, LanguageJob)
    return job


def paths_of(root: Path) -> list[str]:
    return files_of(str(root))[1]


def test_windows_cover_the_training_text_once_without_overlap(source_dir: Path) -> None:
    job = small(source_dir)
    text = b"".join((source_dir / path).read_bytes() for path in paths_of(source_dir) if not is_held_out(path))
    assert job.num_train_samples == len(text) // 17
    inputs, targets = job.batch(list(range(job.num_train_samples)), CPU)
    for i in range(job.num_train_samples):
        window = text[17 * i : 17 * (i + 1)]
        assert bytes(inputs[i].tolist()) == window[:-1]
        assert bytes(targets[i].tolist()) == window[1:]
    assert inputs.dtype == targets.dtype == torch.int64


def test_no_file_is_both_trained_on_and_held_out(source_dir: Path) -> None:
    corpus = load_corpus(str(source_dir), None, "stop")
    train, held_out = bytes(corpus.train.tolist()), bytes(corpus.held_out.tolist())
    for path in paths_of(source_dir):
        text = (source_dir / path).read_bytes()
        assert (text in held_out) == is_held_out(path)
        assert (text in train) != is_held_out(path)
    assert b"IGNORED" not in train + held_out
    assert corpus.num_files == 60


def test_max_bytes_cuts_the_training_text_but_not_the_held_out_one(source_dir: Path) -> None:
    whole, cut = (load_corpus(str(source_dir), limit, "stop") for limit in (None, 1000))
    assert len(cut.train) == 1000
    assert torch.equal(cut.train, whole.train[:1000])
    assert torch.equal(cut.held_out, whole.held_out)
    assert cut.sha256 != whole.sha256


def test_the_text_is_read_once_per_process(source_dir: Path) -> None:
    assert small(source_dir).corpus is small(source_dir, width=32).corpus


def test_the_standard_library_gives_megabytes_of_source_with_a_small_held_out_part() -> None:
    root = standard_library()
    paths = source_files(root)
    sizes = {path: (root / path).stat().st_size for path in paths}
    held_out = sum(size for path, size in sizes.items() if is_held_out(path))
    assert "argparse.py" in paths
    assert not any(SKIPPED_FOLDERS & set(Path(path).parts) for path in paths)
    assert sum(sizes.values()) > 5e6
    assert 0.01 < held_out / sum(sizes.values()) < 0.12


def test_held_out_windows_are_bounded_and_spread_over_the_whole_text(source_dir: Path) -> None:
    few, all_of_them = small(source_dir, eval_windows=3), small(source_dir, eval_windows=1_000_000)
    assert few.num_eval_samples == 3
    assert all_of_them.num_eval_samples == len(all_of_them.corpus.held_out) // 17
    torch.manual_seed(0)
    model = few.build_model()
    assert few.evaluate(model, CPU)["val_loss"] != all_of_them.evaluate(model, CPU)["val_loss"]


def test_evaluation_equals_the_loss_over_all_held_out_windows(source_dir: Path) -> None:
    job = small(source_dir, eval_windows=1_000_000)
    torch.manual_seed(0)
    model = job.build_model()
    windows = job.corpus.held_out[: job.num_eval_samples * 17].view(-1, 17).long()
    expected = torch.nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, 1:].flatten()).item()
    result = job.evaluate(model, CPU)
    assert result["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["val_bits_per_byte"] == pytest.approx(expected / 0.6931471805599453, rel=1e-5)


def test_a_prediction_does_not_see_the_bytes_after_it() -> None:
    torch.manual_seed(0)
    model = ByteGpt(width=16, layers=2, heads=2, context=8, dropout=0.0)
    tokens = torch.randint(0, 256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] += 1 if tokens[0, 5] < 255 else -1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_dropout_works_in_training_only(source_dir: Path) -> None:
    job = small(source_dir, dropout=0.5)
    torch.manual_seed(0)
    model = job.build_model()
    batch = job.batch([0, 1], CPU)
    assert not torch.equal(job.loss(model, batch).loss_sum, job.loss(model, batch).loss_sum)
    assert job.evaluate(model, CPU) == job.evaluate(model, CPU)


def test_biases_and_norms_are_not_decayed(source_dir: Path) -> None:
    job = small(source_dir, weight_decay=0.25, beta1=0.8, beta2=0.9, lr=0.125)
    optimizer = job.build_optimizer(job.build_model())
    for group in optimizer.param_groups:
        assert {param.ndim >= 2 for param in group["params"]} == {group["weight_decay"] == 0.25}
        assert (group["lr"], group["betas"]) == (0.125, (0.8, 0.9))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"context": 4096}, r"bytes of held-out text .* less than one window; needed: context \+ 1 = 4097"),
        ({"max_bytes": 16}, r"16 bytes of training text .* needed: context \+ 1 = 17; lower context, raise max_bytes"),
    ],
)
def test_too_little_text_is_refused_with_what_to_do(source_dir: Path, params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(source_dir, **params).prepare()


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("text")
    with pytest.raises(ValueError, match=r"has no file in it \(hidden ones do not count\)"):
        small(tmp_path).prepare()
    with pytest.raises(ValueError, match="absent' does not exist"):
        small(tmp_path / "absent").prepare()


@pytest.mark.parametrize("is_folder", [False, True])
def test_of_a_single_file_the_end_is_held_out(tmp_path: Path, is_folder: bool) -> None:
    text = bytes(range(1, 251)) * 4
    (tmp_path / "book.txt").write_bytes(text)
    path = tmp_path if is_folder else tmp_path / "book.txt"
    corpus = load_corpus(str(path), None, "stop")
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == text
    assert len(corpus.held_out) == 51
    cut = load_corpus(str(path), 100, "stop")
    assert bytes(cut.train.tolist()) == text[:100]
    assert torch.equal(cut.held_out, corpus.held_out)


@pytest.mark.parametrize("kind", ["binary", "pipe", "link"])
def test_what_is_not_text_is_named_or_left_out(
    source_dir: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(source_dir, root)
    bad = root / "picture.png"
    if kind == "binary":
        bad.write_bytes(b"PNG\0")
    elif kind == "pipe":
        os.mkfifo(bad)
    else:
        bad.symlink_to("nowhere")
    reason = "it is not text: byte 3 is zero" if kind == "binary" else "it is no regular file"
    with pytest.raises(ValueError, match=rf"picture\.png cannot be read: {reason}"):
        small(root).prepare()
    job = small(root, on_bad_file="skip")
    job.prepare()
    assert job.corpus.sha256 == small(source_dir).corpus.sha256
    assert "1 of 61 files below" in caplog.text


def test_training_files_behind_enough_text_are_not_opened(source_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(source_dir, root)
    last = max(path for path in paths_of(root) if not is_held_out(path))
    (root / last).write_bytes(b"\0")
    assert len(load_corpus(str(root), 500, "stop").train) == 500


def test_of_the_standard_library_only_sources_without_tests_count(tmp_path: Path) -> None:
    for path in ("a.py", "pkg/b.py", "test/test_a.py", "site-packages/c.py", "pkg/tests/d.py", "pkg/readme.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert source_files(tmp_path) == ["a.py", "pkg/b.py"]


def test_a_folder_of_empty_files_is_refused(source_dir: Path, tmp_path: Path) -> None:
    for path in paths_of(source_dir):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(ValueError, match="0 bytes of training text"):
        small(tmp_path).prepare()


def test_the_sizes_in_the_readme_are_the_sizes_of_the_models() -> None:
    rows = re.findall(r"^\| ([\d.]+) M \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", README.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for millions, width, layers, heads, context in rows:
        with torch.device("meta"):
            model = ByteGpt(width=int(width), layers=int(layers), heads=int(heads), context=int(context), dropout=0.0)
        num_params = sum(param.numel() for param in model.parameters())
        assert f"{num_params / 1e6:.2f}" == millions
