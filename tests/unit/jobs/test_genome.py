"""The genome job's planted motifs, its best possible AUC, and what is wrong with FASTA files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.genome import GenomeJob
from orchestrator.jobs.genome_data import (
    CONSENSUS,
    MOTIF_LENGTH,
    NUM_HELD_OUT,
    NUM_MOTIFS,
    UNKNOWN,
    area_under_curve,
    from_folder,
    log_likelihood_ratio,
    motifs,
    plant,
    planted,
)

CPU = torch.device("cpu")
README = Path(__file__).parents[3] / "jobs" / "README.md"


def genome_job(**params: object) -> GenomeJob:
    job = build_job("genome", {"width": 8, **params})
    assert isinstance(job, GenomeJob)
    return job


def write_folder(root: Path, count: int = 40, length: int = 12) -> None:
    """Two files of `count` sequences each: class 1 has more G and C."""
    draw = np.random.default_rng(0)
    for name, letters in (("negative.fa", "AATTCG"), ("positive.fa", "GGCCAT")):
        records = [f">{name}-{i} some words\n{''.join(draw.choice(list(letters), length))}\n" for i in range(count)]
        (root / name).write_text("".join(records))


# Planted motifs.


def test_planted_motifs_follow_from_the_seed_alone() -> None:
    first = planted(64, 0)
    planted.cache_clear()
    again, other = planted(64, 0), planted(64, 1)
    assert torch.equal(first.train.codes, again.train.codes)
    assert not torch.equal(first.train.codes, other.train.codes)
    assert first.train.label.float().mean() == first.held_out.label.float().mean() == 0.5
    assert first.held_out.label.tolist() == sorted(first.held_out.label.tolist())
    seen = {row.tobytes() for row in first.train.codes.numpy()}
    assert not any(row.tobytes() in seen for row in first.held_out.codes.numpy())


def test_a_planted_letter_is_the_motifs_own_as_often_as_said() -> None:
    codes, label = plant(3, 0, 20_000, MOTIF_LENGTH)  # no room to move: the whole sequence is the motif
    own = motifs(3).argmax(axis=2)
    agreeing = (codes[label == 1, None] == own).mean(axis=2).max(axis=1)
    assert agreeing.mean() == pytest.approx(CONSENSUS, abs=0.01)


def test_the_likelihood_ratio_is_the_one_counted_by_hand() -> None:
    codes, _ = plant(0, 1, 4, 13)
    for row, seen in zip(codes, log_likelihood_ratio(codes, 0), strict=True):
        terms = [
            np.prod([4 * table[k, row[start + k]] for k in range(MOTIF_LENGTH)])
            for table in motifs(0)
            for start in range(13 - MOTIF_LENGTH + 1)
        ]
        assert len(terms) == NUM_MOTIFS * 4
        assert seen == pytest.approx(np.log(np.mean(terms)))


def test_the_likelihood_ratio_is_a_ratio_of_probabilities() -> None:
    codes, label = plant(0, 0, 40_000, 32)
    ratio = np.exp(log_likelihood_ratio(codes, 0))
    # Its mean over what has no motif is one, and its inverse's over what has one is, too.
    assert (1 / ratio[label == 1]).mean() == pytest.approx(1, abs=0.1)
    share = (ratio / (1 + ratio)).mean()
    assert share == pytest.approx(0.5, abs=0.01)


def test_the_best_auc_in_the_readme_is_the_one_of_the_default_data() -> None:
    (shown,) = re.findall(r"higher AUC than ([\d.]+)\*\*", README.read_text())
    assert f"{planted(64, 0).best_auc:.4f}" == shown


def test_a_length_shorter_than_a_motif_is_refused() -> None:
    with pytest.raises(ValueError, match="length=9 is shorter than a motif; allowed: at least 10"):
        genome_job(length=9).prepare()


def test_training_comes_near_the_best_auc_and_not_above() -> None:
    job = genome_job(width=32)
    torch.manual_seed(0)
    model = job.build_model()
    optimizer = job.build_optimizer(model)
    for first in range(0, 4096, 32):
        optimizer.zero_grad()
        terms = job.loss(model, job.batch(range(first, first + 32), CPU))
        (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = job.evaluate(model, CPU)
    assert result["val_best_auc"] - 0.06 < result["val_auc"] < result["val_best_auc"]


# The metric.


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([1, 1, 1], [0, 1, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
    ],
)
def test_auc_counts_pairs_in_order_and_ties_half(scores: list[int], labels: list[int], expected: float) -> None:
    assert area_under_curve(torch.tensor(scores).float(), torch.tensor(labels)) == expected


def test_auc_of_a_model_that_diverged_is_not_a_number() -> None:
    assert np.isnan(area_under_curve(torch.tensor([1.0, float("nan")]), torch.tensor([0, 1])))


def test_an_evaluation_of_two_sequences_has_both_classes() -> None:
    job = genome_job(eval_samples=2)
    assert job.evaluate(job.build_model(), CPU)["val_auc"] in (0.0, 0.5, 1.0)
    assert len(job.genome.held_out) == NUM_HELD_OUT


# The model.


def test_a_sequence_is_one_of_four_per_letter_and_nothing_where_unknown(tmp_path: Path) -> None:
    write_folder(tmp_path)
    job = genome_job(data_dir=str(tmp_path), length=16)
    letters, label = job.batch([0, 1, 2], CPU)
    assert letters.shape == (3, 4, 16)
    assert letters[:, :, 2:].sum() < letters.sum() == 3 * 12
    assert torch.equal(letters.argmax(dim=1)[:, :12].to(torch.uint8), job.genome.train.codes[:3, :12])
    assert set(label.tolist()) <= {0.0, 1.0}


# FASTA files.


def test_two_files_are_two_classes_split_by_their_letters(tmp_path: Path) -> None:
    write_folder(tmp_path)
    genome = from_folder(str(tmp_path), 12, "stop")
    assert genome.best_auc is None
    assert len(genome.train) + len(genome.held_out) == 80
    gc = ((genome.train.codes == 1) | (genome.train.codes == 2)).float().mean(dim=1)
    assert gc[genome.train.label == 1].mean() > 0.5 > gc[genome.train.label == 0].mean()
    assert 0 < genome.train.label[:10].sum() < 10  # mixed, so that a part of them has both classes
    assert "val_best_auc" not in genome_job(data_dir=str(tmp_path), length=12).evaluate(genome_job().build_model(), CPU)


def test_copies_of_a_sequence_are_in_one_part(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in tmp_path.iterdir():
        text = path.read_text()
        path.write_text(text + text.upper() + text.replace("T", "u"))  # a head has no T
    genome = from_folder(str(tmp_path), 12, "stop")
    parts = [{row.tobytes() for row in part.codes.numpy()} for part in (genome.train, genome.held_out)]
    assert len(genome.train) + len(genome.held_out) == 240
    assert not parts[0] & parts[1]


def test_long_sequences_are_cut_to_their_middle_and_short_ones_filled_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path)
    text = (tmp_path / "negative.fa").read_text()
    (tmp_path / "negative.fa").write_text(text + ">long\r\nCCCCCAC\r\nGTGGGGG\r\n\r\n>short\nACGT\n")
    with caplog.at_level("INFO", logger="orchestrator.jobs"):
        genome = from_folder(str(tmp_path), 4, "stop")
    # ACGT once as the middle of the long one, once as the whole of the short one.
    assert torch.cat([genome.train.codes, genome.held_out.codes]).tolist().count([0, 1, 2, 3]) == 2
    assert "41 sequences of" in caplog.text
    wider = from_folder(str(tmp_path), 6, "stop")
    assert [0, 1, 2, 3, UNKNOWN, UNKNOWN] in torch.cat([wider.train.codes, wider.held_out.codes]).tolist()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (">odd one\nACGE\n", r"record 'odd' \(line 81\) has 'E' as letter 4; allowed: A, C, G, T"),
        (">odd one\n", r"record 'odd' \(line 81\) has no letters"),
        (">\nAC-GT\n", r"record without a name \(line 81\) has '-' as letter 3"),
    ],
)
def test_a_broken_record_is_named_or_left_out(
    tmp_path: Path, record: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path)
    path = tmp_path / "positive.fa"
    path.write_text(path.read_text() + record)
    with pytest.raises(ValueError, match=rf"positive\.fa cannot be read: {message}"):
        from_folder(str(tmp_path), 12, "stop")
    genome = from_folder(str(tmp_path), 12, "skip")
    assert len(genome.train) + len(genome.held_out) == 80
    assert "1 of 41 records of" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [("ACGT\n", "line 1 is no FASTA: needed is a line that begins with >"), ("", "it has no FASTA record")],
)
def test_a_file_that_is_no_fasta_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "positive.fa").write_text(text)
    with pytest.raises(ValueError, match=rf"positive\.fa cannot be read: {message}"):
        from_folder(str(tmp_path), 12, "stop")
    with pytest.raises(ValueError, match=r"positive\.fa has 0 usable sequences and no training one"):
        from_folder(str(tmp_path), 12, "skip")


def test_two_files_are_needed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "third.fasta").write_text(">a\nACGT\n")
    with pytest.raises(ValueError, match=r"has 3 FASTA files .* needed: two, one per class"):
        from_folder(str(tmp_path), 12, "stop")


def test_too_few_sequences_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"has 1 usable sequences and no (training|held-out) one"):
        from_folder(str(tmp_path), 12, "stop")
