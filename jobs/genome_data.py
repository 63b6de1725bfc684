"""Sequences for the `genome` job: planted motifs whose best possible answer is known, or two FASTA files.

Letters are kept as bytes: 0 to 3 for A, C, G, T (U), 4 for unknown ones and for padding. No sequence is in both parts.
Knows nothing of models. Called by `jobs.genome`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.jobs.folder import STOP, existing_folder, files_below, read_files
from orchestrator.jobs.remember import remembered

logger = logging.getLogger(__name__)

Codes = npt.NDArray[np.uint8]

UNKNOWN = 4
NUM_LETTERS = 4

ENDINGS = (".fa", ".fasta", ".fna")
HELD_OUT_PER_256 = 51
"""Sequences of FASTA files held out of 256: 20 %."""

NUM_TRAIN, NUM_HELD_OUT = 32_768, 2048
NUM_MOTIFS, MOTIF_LENGTH, CONSENSUS = 2, 10, 0.85
"""Planted are so many motifs of so many letters; each letter is the motif's own with this probability."""

_BAD = 255
_CODE = np.full(256, _BAD, dtype=np.uint8)
for _letters, _value in (("A", 0), ("C", 1), ("G", 2), ("TU", 3), ("NRYSWKMBDHV", UNKNOWN)):
    for _letter in _letters:
        _CODE[[ord(_letter), ord(_letter.lower())]] = _value


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Sequences and their classes.

    Attributes:
        codes: (N, L) uint8, the letters, `UNKNOWN` behind the end.
        label: (N,) uint8 of 0 and 1.
    """

    codes: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Genome:
    """The two parts; held-out sequences of class 0 come before those of class 1.

    Attributes:
        train: sequences to train on, classes mixed.
        held_out: the others.
        best_auc: AUC on the held-out part of the exact likelihood ratio, which no classifier beats but by luck; None
            where nobody knows the distribution.
    """

    train: Part
    held_out: Part
    best_auc: float | None = None


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Probability that a sequence of class 1 has a higher score than one of class 0, ties counting half.

    NaN where a score is NaN. Both classes must be there. Source: Mann and Whitney 1947.
    """
    if bool(scores.isnan().any()):
        return float("nan")
    scores = scores.double().cpu()
    others = scores[labels == 0].sort().values
    chosen = scores[labels == 1]
    below = torch.searchsorted(others, chosen) + torch.searchsorted(others, chosen, right=True)
    return below.double().mean().item() / (2 * len(others))


# Planted motifs.


def motifs(seed: int) -> npt.NDArray[np.float64]:
    """Probability of each letter at each place of each motif, (NUM_MOTIFS, MOTIF_LENGTH, 4)."""
    own = np.random.default_rng([seed, 0]).integers(0, NUM_LETTERS, (NUM_MOTIFS, MOTIF_LENGTH))
    return np.where(np.eye(NUM_LETTERS, dtype=bool)[own], CONSENSUS, (1 - CONSENSUS) / (NUM_LETTERS - 1))


def plant(seed: int, part: int, count: int, length: int) -> tuple[Codes, npt.NDArray[np.uint8]]:
    """Sequences of even letters, every second one with one motif somewhere: codes (count, length) and classes."""
    draw = np.random.default_rng([seed, 1, part])
    codes = draw.integers(0, NUM_LETTERS, (count, length)).astype(np.uint8)
    label = (np.arange(count) % 2).astype(np.uint8)
    rows = np.flatnonzero(label)
    which = draw.integers(0, NUM_MOTIFS, len(rows))
    start = draw.integers(0, length - MOTIF_LENGTH + 1, len(rows))
    ends = motifs(seed).cumsum(axis=2)[which]
    drawn = (draw.random((len(rows), MOTIF_LENGTH, 1)) > ends[:, :, :-1]).sum(axis=2)
    codes[rows[:, None], start[:, None] + np.arange(MOTIF_LENGTH)] = drawn
    return codes, label


def log_likelihood_ratio(codes: Codes, seed: int) -> npt.NDArray[np.float64]:
    """Log of how much likelier each sequence is with a motif than without, exactly as `plant` draws them.

    The motif and its place are not known: the ratio is the mean over all of them. Source: Neyman and Pearson 1933.
    """
    ratio = np.log(motifs(seed) * NUM_LETTERS)
    places = codes.shape[1] - MOTIF_LENGTH + 1
    logs = np.zeros((NUM_MOTIFS, len(codes), places))
    for offset in range(MOTIF_LENGTH):
        logs += ratio[:, offset][:, codes[:, offset : offset + places]]
    likelihood: npt.NDArray[np.float64] = np.exp(logs).mean(axis=(0, 2))
    return np.log(likelihood)


@lru_cache(maxsize=2)
def planted(length: int, seed: int) -> Genome:
    """Both parts of planted motifs.

    Raises:
        ValueError: a motif is longer than a sequence.
    """
    if length < MOTIF_LENGTH:
        raise ValueError(f"job genome: length={length} is shorter than a motif; allowed: at least {MOTIF_LENGTH}")
    train = plant(seed, 0, NUM_TRAIN, length)
    codes, label = plant(seed, 1, NUM_HELD_OUT, length)
    order = np.argsort(label, kind="stable")
    held_out = _part(codes[order], label[order])
    best = area_under_curve(torch.from_numpy(log_likelihood_ratio(codes[order], seed)), held_out.label)
    logger.info("planted motifs: the best possible AUC on the held-out part is %.4f", best)
    return Genome(train=_part(*train), held_out=held_out, best_auc=best)


def _part(codes: Codes, label: npt.NDArray[np.uint8]) -> Part:
    return Part(codes=torch.from_numpy(codes), label=torch.from_numpy(label))


# FASTA files.


@remembered(maxsize=2)
def from_folder(data_dir: str, length: int, on_bad_file: str) -> Genome:
    """Two FASTA files as two classes, the second by name being class 1; 20 % of the sequences held out.

    A sequence's part follows from a hash of what is used of it, so that copies of it are in one part.

    Raises:
        ValueError: no such folder, not two files, a class without sequences in a part, or a broken record and
            `on_bad_file` is 'stop'.
    """
    root = existing_folder(data_dir)
    files = files_below(root, ENDINGS)
    if len(files) != 2:
        raise ValueError(
            f"data_dir={data_dir!r} has {len(files)} FASTA files ({', '.join(ENDINGS)}); needed: two, one per class, "
            f"of which the second by name is class 1 (say, negative.fa and positive.fa)"
        )
    found = dict(read_files(root, files, lambda path: _read(path, length, on_bad_file), on_bad_file))
    parts: dict[bool, list[tuple[bytes, int, Codes]]] = {False: [], True: []}
    for label, file in enumerate(files):
        for codes in found.get(file, []):
            digest = hashlib.sha256(codes.tobytes()).digest()
            parts[digest[0] < HELD_OUT_PER_256].append((digest, label, codes))
    for is_held_out, name in ((False, "training"), (True, "held-out")):
        for label, file in enumerate(files):
            if label not in {row[1] for row in parts[is_held_out]}:
                raise ValueError(
                    f"{root / file} has {len(found.get(file, []))} usable sequences and no {name} one among them (1 in "
                    f"5 is held out, by a hash of its letters); add sequences"
                )
    parts[False].sort(key=lambda row: row[0])  # mixes the classes, for ever in the same way
    logger.info(
        "FASTA files below %s: %d training sequences, %d held out; class 1 is %s",
        root,
        len(parts[False]),
        len(parts[True]),
        files[1],
    )
    train, held_out = (
        _part(np.stack([row[2] for row in rows]), np.array([row[1] for row in rows], dtype=np.uint8))
        for rows in (parts[False], parts[True])
    )
    return Genome(train=train, held_out=held_out)


def _read(path: Path, length: int, on_bad_file: str) -> list[Codes]:
    """The sequences of a FASTA file, the middle of longer ones, filled up with unknown letters.

    Raises:
        ValueError: it is no FASTA file, or a record is broken and `on_bad_file` is 'stop'.
    """
    sequences, num_cut, num_bad = [], 0, 0
    for line, name, letters in _records(path):
        codes = _CODE[np.frombuffer(letters, dtype=np.uint8)]
        reason = _fault(letters, codes)
        if reason:
            if on_bad_file == STOP:
                raise ValueError(f"record {name} (line {line}) {reason}")
            logger.warning("left out record %s (line %d) of %s: it %s", name, line, path, reason)
            num_bad += 1
            continue
        num_cut += len(codes) > length
        begin = max(0, (len(codes) - length) // 2)
        kept = codes[begin : begin + length]
        sequences.append(np.pad(kept, (0, length - len(kept)), constant_values=UNKNOWN))
    if num_bad:
        logger.warning("%d of %d records of %s left out as broken", num_bad, num_bad + len(sequences), path)
    if num_cut:
        logger.info("%d sequences of %s are longer than %d letters: their middle is used", num_cut, path, length)
    return sequences


def _fault(letters: bytes, codes: Codes) -> str | None:
    """What is wrong with a record, None where nothing is."""
    if not letters:
        return "has no letters"
    bad = np.flatnonzero(codes == _BAD)
    if not len(bad):
        return None
    seen = ascii(chr(letters[bad[0]]))
    return f"has {seen} as letter {bad[0] + 1}; allowed: A, C, G, T, U, N and the IUPAC codes of nucleotides"


def _records(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Line of its head, name and letters of every record.

    Raises:
        ValueError: there are letters before the first head.
    """
    head: tuple[int, str] | None = None
    letters: list[bytes] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.startswith(b">"):
                if head:
                    yield *head, b"".join(letters)
                words = line[1:].split()
                head, letters = (number, ascii(words[0].decode(errors="replace")) if words else "without a name"), []
            elif line.strip():
                if not head:
                    raise ValueError(
                        f"line {number} is no FASTA: needed is a line that begins with > before any letters"
                    )
                letters.append(line.strip())
    if not head:
        raise ValueError("it has no FASTA record; needed: lines that begin with >, each with letters below")
    yield *head, b"".join(letters)
