"""What little thought reaches on the data of each job: the answers that a trained network is held against.

Each function takes the job of a search file, prepared, and returns the name of a simple rule and what it reaches in the
job's own metric, on the very samples that `evaluate` looks at. Used by `bench_jobs`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.jobs.data import Indices
from orchestrator.jobs.genome import GenomeJob
from orchestrator.jobs.image import ImageJob
from orchestrator.jobs.image_data import LabelledImages
from orchestrator.jobs.job import Job
from orchestrator.jobs.language import LanguageJob
from orchestrator.jobs.speech import SpeechJob, edit_distance
from orchestrator.jobs.tissue import TissueJob

Answer = tuple[str, float]
Floats = npt.NDArray[np.float64]

NUM_BYTES = 256
GZIP_LEVEL = 9


def evenly(total: int, count: int) -> Indices:
    """The numbers that `evaluate` of every job looks at: `count` of `total`, from the first to the last."""
    return np.linspace(0, total - 1, min(total, count)).astype(np.int64)


# Language: bits per byte.


def language(job: Job) -> list[Answer]:
    """Bytes one by one, and after the one, two or three before them, counted in the training text; and gzip."""
    assert isinstance(job, LanguageJob)
    train = job.corpus.train.numpy()
    windows = job.corpus.held_out.numpy()
    size = job._context + 1
    windows = windows[: len(windows) // size * size].reshape(-1, size)[evenly(len(windows) // size, job._eval_windows)]
    packed = zlib.compress(job.corpus.held_out.numpy().tobytes(), GZIP_LEVEL)
    return [
        *((f"{order} bytes before", _ngram_bits(train, windows, order)) for order in range(4)),
        ("gzip of the whole held-out text", 8 * len(packed) / len(job.corpus.held_out)),
    ]


def _ngram_bits(train: npt.NDArray[np.uint8], windows: npt.NDArray[np.uint8], order: int) -> float:
    """Bits per byte of counts, each order interpolated with the one below. Source: Witten and Bell 1991."""
    told = np.full(windows[:, 1:].shape, 1 / NUM_BYTES)
    for length in range(order + 1):
        codes = _codes(train, length + 1)
        values, counts = np.unique(codes, return_counts=True)
        seen = dict(zip(values.tolist(), counts.tolist(), strict=True))
        contexts, totals = np.unique(values // NUM_BYTES, return_inverse=True)
        sums = np.bincount(totals, weights=counts)
        kinds = np.bincount(totals)
        place = {context: i for i, context in enumerate(contexts.tolist())}
        for row, window in enumerate(windows):
            for column in range(windows.shape[1] - 1):
                begin = column + 1 - length
                if begin < 0:
                    continue  # the window does not say what was before it: the shorter contexts' answer stays
                code = 0
                for byte in window[begin : column + 2].tolist():
                    code = code * NUM_BYTES + byte
                i = place.get(code // NUM_BYTES)
                if i is not None:
                    told[row, column] = (seen.get(code, 0) + kinds[i] * told[row, column]) / (sums[i] + kinds[i])
    return float(-np.log2(told).mean())


def _codes(text: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.int64]:
    """Every run of `length` bytes as one number."""
    codes = np.zeros(len(text) - length + 1, dtype=np.int64)
    for offset in range(length):
        codes = codes * NUM_BYTES + text[offset : len(codes) + offset]
    return codes


# Image: accuracy.


def image(job: Job) -> list[Answer]:
    """Logistic regression on the pixels."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    assert isinstance(job, ImageJob)
    images = job.images
    assert isinstance(images, LabelledImages)
    chosen = evenly(len(images.held_out), job._eval_samples)
    scale = images.train.double().std().item()
    pixels, truth = images.train.flatten(1).numpy() / scale, images.train_labels.numpy()
    asked = images.held_out.flatten(1).numpy()[chosen] / scale
    model = LogisticRegression(max_iter=2000).fit(pixels, truth)
    return [("logistic regression", float(model.score(asked, images.held_out_labels.numpy()[chosen])))]


# Tissue: Dice.


def tissue(job: Job) -> list[Answer]:
    """One threshold on one colour, or on a difference of two, that is best on the training pictures."""
    assert isinstance(job, TissueJob)
    train, held_out = job.tissue.train, job.tissue.held_out
    pixels, mask = _all_pixels(train)
    asked, truth = _all_pixels(held_out)
    best = (0.0, 0.0)
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1)):
        for sign in (1, -1):
            values, other = sign * pixels @ np.array(weights), sign * asked @ np.array(weights)
            for threshold in np.quantile(values, np.linspace(0.02, 0.98, 49)):
                best = max(best, (_dice(values > threshold, mask), _dice(other > threshold, truth)))
    return [("a threshold on a colour", best[1])]


def _all_pixels(patches: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    cut, mask = patches.cut(torch.arange(len(patches)))
    return cut.permute(0, 2, 3, 1).reshape(-1, 3).long().numpy(), mask.flatten().bool().numpy()


def _dice(marked: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    return float(2 * (marked & truth).sum() / (marked.sum() + truth.sum()))


# Speech: word error rate.


def speech(job: Job) -> list[Answer]:
    """Always the most frequent transcript, and the transcript of the training utterance that is most alike."""
    assert isinstance(job, SpeechJob)
    part = job.speech.held_out
    chosen = evenly(len(part), job._eval_samples)
    said = [part.words[number] for number in chosen]
    words_train = job.speech.train.words
    usual = Counter(words_train).most_common(1)[0][0]
    cpu = torch.device("cpu")
    known = job._frames(job.speech.train, torch.arange(len(words_train)), cpu).flatten(1)
    asked = job._frames(part, torch.from_numpy(chosen), cpu).flatten(1)
    nearest = torch.cdist(asked, known).argmin(dim=1).tolist()

    def rate(heard: list[tuple[str, ...]]) -> float:
        errors = sum(edit_distance(a, b) for a, b in zip(said, heard, strict=True))
        return errors / sum(map(len, said))

    return [
        ("always the most frequent words", rate([usual] * len(said))),
        ("the words of the nearest training utterance", rate([words_train[number] for number in nearest])),
    ]


# Genome: AUC.


def genome(job: Job) -> list[Answer]:
    """Logistic regression on how often each run of four letters occurs; and the exact likelihood ratio, the best."""
    from sklearn.linear_model import LogisticRegression

    from orchestrator.jobs.genome_data import area_under_curve

    assert isinstance(job, GenomeJob)
    data = job.genome
    counts = _kmer_counts(data.train.codes.numpy())
    model = LogisticRegression(max_iter=2000).fit(counts, data.train.label.numpy())
    chosen = torch.from_numpy(evenly(len(data.held_out), job._eval_samples))
    scores = torch.from_numpy(model.decision_function(_kmer_counts(data.held_out.codes[chosen].numpy())))
    assert data.best_auc is not None
    return [
        ("logistic regression on runs of 4 letters", area_under_curve(scores, data.held_out.label[chosen])),
        ("the likelihood ratio, best possible", data.best_auc),
    ]


def _kmer_counts(codes: npt.NDArray[np.uint8], length: int = 4) -> Floats:
    number = np.zeros((len(codes), codes.shape[1] - length + 1), dtype=np.int64)
    for offset in range(length):
        number = number * 4 + codes[:, offset : offset + number.shape[1]]
    rows = np.zeros((len(codes), 4**length))
    np.add.at(rows, (np.arange(len(codes))[:, None], number), 1.0)
    return rows


BASELINES: dict[str, Callable[[Job], list[Answer]]] = {
    "language": language,
    "image": image,
    "tissue": tissue,
    "speech": speech,
    "genome": genome,
}


def answers(job: str, params: dict[str, Any]) -> list[Answer]:
    """All simple answers to a job."""
    from orchestrator.jobs import build_job

    built = build_job(job, params)
    built.prepare()
    return BASELINES[job](built)
