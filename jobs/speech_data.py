"""Utterances with their words for the `speech` job: made here, or a folder like LibriSpeech's or Speech Commands'.

Sound becomes log-mel frames once, kept in memory as fp16. Knows nothing of models. Called by `jobs.speech`.
"""

from __future__ import annotations

import logging
import re
import wave
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.jobs import voices
from orchestrator.jobs.extras import load_extra
from orchestrator.jobs.folder import BROKEN, existing_folder, files_below, is_held_out, read_files
from orchestrator.jobs.remember import remembered
from orchestrator.jobs.voices import Wave

logger = logging.getLogger(__name__)

Words = tuple[str, ...]
Utterance = tuple[npt.NDArray[np.float16], Words]
"""Log-mel frames (T, NUM_MELS) and the words said."""

NUM_MELS = 40
WINDOW_S, HOP_S = 0.032, 0.0125
FLOOR = 1e-4
"""Power added before the logarithm: about that of silence in 16 bits."""

HELD_OUT_PER_256 = 26
"""Speakers of a folder held out of 256: 10 %."""

NUM_TRAIN, NUM_HELD_OUT, MAX_WORDS = 1536, 192, 3
"""Utterances made here, and words in one at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Utterances of one part, one after another.

    Attributes:
        frames: (F, NUM_MELS) fp16.
        first: (N,) int64, the first frame of each.
        length: (N,) int64, its frames.
        words: what is said in each.
    """

    frames: Tensor
    first: Tensor
    length: Tensor
    words: tuple[Words, ...]

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """Both parts; `source` says in words where the sound is from."""

    train: Part
    held_out: Part
    source: str


def _part(utterances: list[Utterance]) -> Part:
    lengths = np.array([len(frames) for frames, _ in utterances])
    return Part(
        frames=torch.from_numpy(np.concatenate([frames for frames, _ in utterances])),
        first=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)[:-1]])),
        length=torch.from_numpy(lengths),
        words=tuple(words for _, words in utterances),
    )


# Features.


@lru_cache(maxsize=4)
def _mel_filters(rate: int, num_bins: int) -> npt.NDArray[np.float64]:
    """Triangles evenly spaced on the mel scale, (num_bins, NUM_MELS). Source: O'Shaughnessy 1987, 2595 log10."""
    edges_mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), NUM_MELS + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    bins = np.linspace(0, rate / 2, num_bins)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(sound: Wave, rate: int) -> npt.NDArray[np.float16]:
    """Log power of `NUM_MELS` bands every `HOP_S` seconds, (T, NUM_MELS)."""
    window, hop = int(WINDOW_S * rate), int(HOP_S * rate)
    padded = np.pad(sound, (window // 2, window // 2 + window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(sound) + 1 : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32))) ** 2
    return np.log(power @ _mel_filters(rate, power.shape[1]) + FLOOR).astype(np.float16)


def resampled(sound: Wave, from_rate: int, to_rate: int) -> Wave:
    """The same sound at another rate, without what the lower of the two cannot hold."""
    if from_rate == to_rate or not len(sound):
        return sound
    count = max(1, round(len(sound) * to_rate / from_rate))
    spectrum = np.fft.rfft(sound)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(sound))).astype(np.float32)


# Made utterances.


@remembered(maxsize=2)
def made(data: str, rate: int, seed: int, max_samples: int | None) -> Speech:
    """Spoken digits, one to three in a row: by espeak-ng ('espeak', or 'auto' where it is installed) or as signals.

    The first n utterances are the same whatever `max_samples` is.

    Raises:
        ValueError: espeak-ng is asked for and missing, or fails.
    """
    is_espeak = data == "espeak" or (data == "auto" and voices.has_espeak())
    source = "espeak-ng" if is_espeak else "signal synthesis"
    logger.info("utterances are made by %s; they are not speech of people", source)
    count = NUM_TRAIN if max_samples is None else min(max_samples, NUM_TRAIN)
    parts = []
    for part, number in ((0, count), (1, NUM_HELD_OUT)):
        spoken = _espeak_words(part, rate) if is_espeak else _signal_words(part, rate)
        parts.append(_part([_utterance(spoken, seed, part, i, rate) for i in range(number)]))
    return Speech(train=parts[0], held_out=parts[1], source=source)


@lru_cache(maxsize=4)
def _espeak_words(part: int, rate: int) -> tuple[tuple[Wave, ...], ...]:
    """For each voice of a part, its words."""
    names = (voices.TRAIN_VOICES, voices.HELD_OUT_VOICES)[part]
    return tuple(
        tuple(resampled(voices.espeak(word, voice), voices.ESPEAK_RATE, rate) for word in voices.WORDS)
        for voice in names
    )


@lru_cache(maxsize=4)
def _signal_words(part: int, rate: int) -> tuple[tuple[Wave, ...], ...]:
    first = voices.NUM_TRAIN_SPEAKERS * part
    count = (voices.NUM_TRAIN_SPEAKERS, voices.NUM_HELD_OUT_SPEAKERS)[part]
    speakers = range(first, first + count)
    return tuple(tuple(voices.signal_word(word, each, rate) for word in voices.WORDS) for each in speakers)


def _utterance(spoken: tuple[tuple[Wave, ...], ...], seed: int, part: int, number: int, rate: int) -> Utterance:
    """Words of one voice with gaps, a pace, a loudness and noise of their own."""
    draw = np.random.default_rng([seed, part, number])
    voice = spoken[draw.integers(len(spoken))]
    chosen = draw.integers(len(voices.WORDS), size=draw.integers(1, MAX_WORDS + 1))
    pieces = [np.zeros(int(rate * draw.uniform(0.02, 0.12)), dtype=np.float32)]
    for word in chosen:
        pace = draw.uniform(0.88, 1.12)
        pieces += [
            resampled(voice[word], rate, int(rate * pace)),
            np.zeros(int(rate * draw.uniform(0.02, 0.1)), np.float32),
        ]
    sound = np.concatenate(pieces) * draw.uniform(0.4, 1.2)
    sound = (sound + draw.uniform(0.002, 0.02) * draw.standard_normal(len(sound))).astype(np.float32)
    return log_mel(sound, rate), tuple(voices.WORDS[word] for word in chosen)


# Folders.


@remembered(maxsize=2)
def from_folder(data_dir: str, rate: int, max_seconds: float, on_bad_file: str) -> Speech:
    """The utterances of a folder laid out like LibriSpeech (*.trans.txt) or Speech Commands (a folder per word).

    Raises:
        ValueError: no such folder, nothing usable in it, or a broken file and `on_bad_file` is 'stop'.
    """
    root = existing_folder(data_dir)
    transcripts = files_below(root, (".trans.txt",))
    entries = _librispeech(root, transcripts, on_bad_file) if transcripts else _commands(root)
    said = {path: words for path, (words, _) in entries.items()}
    if any(path.endswith(".flac") for path in said):
        load_extra("soundfile", "reading FLAC files")  # before the first file, so that it is not taken for a broken one
    max_frames = int(max_seconds / HOP_S)
    parts: dict[bool, list[Utterance]] = {False: [], True: []}
    num_long = 0
    for path, frames in read_files(root, said, lambda path: log_mel(read_sound(path, rate), rate), on_bad_file):
        if len(frames) > max_frames:
            num_long += 1
        else:
            parts[entries[path][1]].append((frames, said[path]))
    if num_long:
        logger.warning("left out %d utterances longer than max_seconds=%g", num_long, max_seconds)
    for held_out, name in ((False, "training"), (True, "held-out")):
        if not parts[held_out]:
            raise ValueError(
                f"data_dir={data_dir!r} has no usable {name} utterance among {len(said)} files ({num_long} longer than "
                f"max_seconds={max_seconds:g}); needed: folders of one word each with WAV files, or LibriSpeech's "
                f"*.trans.txt with FLAC or WAV files beside them"
            )
    logger.info("utterances below %s: %d training, %d held out", root, len(parts[False]), len(parts[True]))
    return Speech(train=_part(parts[False]), held_out=_part(parts[True]), source=str(root))


def _commands(root: Path) -> dict[str, tuple[Words, bool]]:
    """Words and part of each file; the part is that of `validation_list.txt`, or goes by the speaker."""
    held_out = _listed(root / "validation_list.txt")
    left_out = _listed(root / "testing_list.txt") or set()
    found: dict[str, tuple[Words, bool]] = {}
    for path in files_below(root, (".wav",)):
        word, slash, name = path.partition("/")
        if slash and not word.startswith("_") and path not in left_out:
            speaker = name.partition("_nohash_")[0] if "_nohash_" in name else name
            is_out = is_held_out(speaker, HELD_OUT_PER_256) if held_out is None else path in held_out
            found[path] = ((word.lower(),), is_out)
    return found


def _listed(path: Path) -> set[str] | None:
    """The files that a list names; None where there is no such list.

    Raises:
        ValueError: it is no text; without it nobody knows what to hold out, so it is not skipped.
    """
    if not path.is_file():
        return None
    try:
        return set(path.read_text(encoding="utf-8").split())
    except BROKEN as error:
        raise ValueError(f"{path} cannot be read: {error}; repair or remove it") from error


def _librispeech(root: Path, transcripts: Iterable[str], on_bad_file: str) -> dict[str, tuple[Words, bool]]:
    """Words and part of each file; parts named dev-* are held out where there are any, else one speaker in ten.

    Raises:
        ValueError: a broken transcript and `on_bad_file` is 'stop'.
    """
    transcripts = [path for path in transcripts if not re.search(r"(^|/)test-", path)]
    is_split = any(re.search(r"(^|/)dev-", path) for path in transcripts)
    found = {}
    for path, lines in read_files(root, transcripts, _read_transcript, on_bad_file):
        base = path.rpartition("/")[0]
        for name, words in lines.items():
            speaker = name.partition("-")[0]
            is_out = bool(re.search(r"(^|/)dev-", path)) if is_split else is_held_out(speaker, HELD_OUT_PER_256)
            stem = f"{base}/{name}" if base else name
            ending = ".wav" if (root / f"{stem}.wav").is_file() else ".flac"
            found[stem + ending] = (words, is_out)
    return found


def _read_transcript(path: Path) -> dict[str, Words]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if len(line) < 2 or "/" in line[0]:
            raise ValueError(f"line {number} is not a name and what is said")
    return {line[0]: tuple(word.lower() for word in line[1:]) for line in lines}


def read_sound(path: Path, rate: int) -> Wave:
    """The samples of a WAV or FLAC file at `rate`, channels mixed.

    Raises:
        ValueError: no such sound, an empty one, a form of WAV other than 8, 16 or 32 bits; or soundfile is missing.
    """
    reader: Callable[[Path], tuple[Wave, int]] = _read_flac if path.suffix == ".flac" else _read_wav
    sound, from_rate = reader(path)
    if not len(sound):
        raise ValueError("it holds no sound")
    if not np.isfinite(sound).all():
        raise ValueError("it holds samples that are not numbers")
    return resampled(sound, from_rate, rate)


def _read_wav(path: Path) -> tuple[Wave, int]:
    try:
        with wave.open(str(path)) as opened:
            width, channels, from_rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            raw = opened.readframes(opened.getnframes())
            num_missing = opened.getnframes() * width * channels - len(raw)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"no WAV file: {str(error) or 'it ends too early'}") from error
    if num_missing:
        raise ValueError(f"it ends {num_missing} bytes too early")
    if width not in {1, 2, 4}:
        raise ValueError(f"{8 * width} bits per sample; allowed: 8, 16 or 32")
    if width == 1:  # unsigned, unlike the others
        values = np.frombuffer(raw, dtype=np.uint8).astype(np.float32) / 128 - 1
    else:
        values = np.frombuffer(raw, dtype=f"<i{width}").astype(np.float32) / (1 << (8 * width - 1))
    return values.reshape(-1, channels).mean(axis=1), from_rate


def _read_flac(path: Path) -> tuple[Wave, int]:
    soundfile = load_extra("soundfile", "reading FLAC files")
    try:
        values, from_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(str(error)) from error
    return values.mean(axis=1), int(from_rate)
