"""Spoken words without a recording: by espeak-ng where it is installed, otherwise by adding up signals.

Neither is speech of people: figures on them say that training works, not how good a recogniser is. Words of one voice
are the same samples every time. Knows nothing of features or models. Called by `jobs.speech_data`.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import numpy as np
import numpy.typing as npt

Wave = npt.NDArray[np.float32]
"""Samples in [-1, 1]."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

ESPEAK = "espeak-ng"
ESPEAK_TIMEOUT_S = 20.0
ESPEAK_RATE = 22050
TRAIN_VOICES = ("en-us", "en-us+m1", "en-us+m3", "en-gb+m4", "en-gb", "en-us+f1", "en-gb+f2", "en-us+f3", "en-gb+m7")
HELD_OUT_VOICES = ("en-us+m2", "en-gb+f4", "en-us+f2")
"""Voices of espeak-ng; the held-out ones are never trained on."""

NUM_TRAIN_SPEAKERS, NUM_HELD_OUT_SPEAKERS = 9, 3
"""Speakers of the signal synthesis."""

_PHONES: dict[str, tuple[float, float, float, float]] = {
    # First and second formant in Hz, share of noise, seconds. Formants after Peterson and Barney 1952, rounded.
    "iy": (270, 2290, 0.0, 0.12),
    "ih": (390, 1990, 0.0, 0.08),
    "eh": (530, 1840, 0.0, 0.10),
    "ah": (640, 1190, 0.0, 0.09),
    "ao": (570, 840, 0.0, 0.12),
    "uw": (300, 870, 0.0, 0.12),
    "aa": (730, 1090, 0.0, 0.11),
    "er": (490, 1350, 0.0, 0.10),
    "w": (320, 640, 0.0, 0.06),
    "n": (280, 1500, 0.1, 0.08),
    "r": (420, 1300, 0.0, 0.06),
    "z": (260, 3100, 0.6, 0.09),
    "s": (2600, 3500, 1.0, 0.11),
    "f": (1200, 2600, 0.9, 0.09),
    "th": (1600, 3000, 0.8, 0.07),
    "t": (2200, 3200, 1.0, 0.04),
    "k": (1300, 2100, 1.0, 0.05),
    "v": (300, 1200, 0.4, 0.06),
}
_SPELLING = {
    "zero": "z ih r ao",
    "one": "w ah n",
    "two": "t uw",
    "three": "th r iy",
    "four": "f ao r",
    "five": "f aa ih v",
    "six": "s ih k s",
    "seven": "s eh v ah n",
    "eight": "eh ih t",
    "nine": "n aa ih n",
}
_BANDWIDTH_HZ = 90.0


def has_espeak() -> bool:
    """Whether espeak-ng is installed here."""
    return shutil.which(ESPEAK) is not None


def espeak(word: str, voice: str) -> Wave:
    """A word in a voice of espeak-ng, at 22,050 samples per second.

    Raises:
        ValueError: espeak-ng is missing, does not answer, or does not know the voice.
    """
    command = [ESPEAK, "-v", voice, "-s", "165", "--stdout", word]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=ESPEAK_TIMEOUT_S)
    except FileNotFoundError:
        text = f"{ESPEAK} is not installed (on Debian and Ubuntu: apt install {ESPEAK}); or choose data=signal"
        raise ValueError(f"job speech: {text}") from None
    except subprocess.SubprocessError as error:
        raise ValueError(f"job speech: {' '.join(command)} failed ({error}); choose data=signal") from error
    # The sizes in the header of a stream are not known when it is written: what follows 'data' and a size is the sound.
    samples = done.stdout.partition(b"data")[2][4:]
    wave = (np.frombuffer(samples[: len(samples) // 2 * 2], dtype="<i2") / 32768).astype(np.float32)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    if not len(loud):
        raise ValueError(f"job speech: {' '.join(command)} gave no sound; choose data=signal")
    return wave[loud[0] : loud[-1] + 1]


def signal_word(word: str, speaker: int, rate: int) -> Wave:
    """A word as harmonics and noise under two formants per phone; a speaker is a pitch, a pace and a vocal tract."""
    draw = np.random.default_rng([7, speaker])
    pitch, tract, pace = 90 + 130 * draw.random(), 0.88 + 0.3 * draw.random(), 0.85 + 0.4 * draw.random()
    noise = np.random.default_rng([8, speaker, WORDS.index(word)])
    parts = []
    for phone in _SPELLING[word].split():
        first, second, noisiness, seconds = _PHONES[phone]
        count = int(seconds * pace * rate)
        time_s = np.arange(count) / rate
        multiples = np.arange(1, int(rate / 2 / pitch)) * pitch
        loudness = _resonance(multiples, first * tract) + 0.6 * _resonance(multiples, second * tract)
        voiced = (loudness[:, None] * np.sin(2 * np.pi * multiples[:, None] * time_s)).sum(axis=0)
        spectrum = np.fft.rfft(noise.standard_normal(count))
        frequencies = np.fft.rfftfreq(count, 1 / rate)
        shaped = _resonance(frequencies, first * tract, 5) + _resonance(frequencies, second * tract, 5)
        hiss = np.fft.irfft(spectrum * shaped, count)
        mixed = (1 - noisiness) * _levelled(voiced) + noisiness * _levelled(hiss)
        parts.append(mixed * np.sin(np.pi * (np.arange(count) + 0.5) / count) ** 0.5)
    return (0.5 * np.concatenate(parts)).astype(np.float32)


def _resonance(frequencies: npt.NDArray[Any], middle: float, widths: float = 1.0) -> npt.NDArray[np.float64]:
    return np.asarray(1 / (1 + ((frequencies - middle) / (_BANDWIDTH_HZ * widths)) ** 2))


def _levelled(sound: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(sound / (np.abs(sound).max() + 1e-9))
