"""The speech job's sound, folders, units and error rate, and what is wrong with a folder of sound."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.jobs import build_job, voices
from orchestrator.jobs.folder import is_held_out
from orchestrator.jobs.speech import SpeechJob, edit_distance
from orchestrator.jobs.speech_data import HELD_OUT_PER_256, from_folder, log_mel, made, read_sound, resampled

CPU = torch.device("cpu")
RATE = 8000


def speech_job(**params: object) -> SpeechJob:
    job = build_job("speech", {"width": 16, "layers": 1, "heads": 2, "data": "signal", "max_samples": 24, **params})
    assert isinstance(job, SpeechJob)
    return job


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE) -> voices.Wave:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, sound: voices.Wave, rate: int = RATE, width: int = 2, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(width)
        opened.setframerate(rate)
        scaled = sound * (127 if width == 1 else (1 << (8 * width - 1)) - 1)
        values = (scaled + 128).astype(np.uint8) if width == 1 else scaled.astype(f"<i{width}")
        opened.writeframes(np.repeat(values, channels).tobytes())


def speakers(count: int, *, held_out: bool) -> list[str]:
    return [str(i) for i in range(100, 400) if is_held_out(str(i), HELD_OUT_PER_256) == held_out][:count]


def write_commands(root: Path) -> None:
    for word, hertz in (("yes", 300.0), ("no", 900.0)):
        for speaker in speakers(3, held_out=False) + speakers(1, held_out=True):
            write_wav(root / word / f"{speaker}_nohash_0.wav", tone(0.5, hertz))
    write_wav(root / "_background_noise_" / "hum.wav", tone(0.5))


def write_librispeech(root: Path, chapter: str, lines: dict[str, str]) -> None:
    folder = root / chapter
    for name in lines:
        write_wav(folder / f"{name}.wav", tone(0.6))
    (folder / f"{chapter.rpartition('/')[2]}.trans.txt").write_text("".join(f"{a} {b}\n" for a, b in lines.items()))


# Sound.


def test_a_tone_is_loudest_in_its_own_band() -> None:
    bands = [int(log_mel(tone(0.5, hertz), RATE)[20].argmax()) for hertz in (200.0, 800.0, 3000.0)]
    assert bands[0] < bands[1] < bands[2]
    assert log_mel(tone(0.5), RATE).shape == (41, 40)


@pytest.mark.parametrize("rate", [4000, 16000, 22050])
def test_resampling_keeps_a_tone_a_tone(rate: int) -> None:
    middle = resampled(tone(0.5, 440.0, rate), rate, RATE)[200:-200]
    assert np.allclose(middle, tone(0.5)[200:-200], atol=0.03)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_plain_wav_files_of_every_width_are_read(tmp_path: Path, width: int, channels: int) -> None:
    write_wav(tmp_path / "a.wav", tone(0.1), width=width, channels=channels)
    assert np.allclose(read_sound(tmp_path / "a.wav", RATE), tone(0.1), atol=0.02)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no WAV file: it ends too early"),
        (b"RIFF....junk", "no WAV file"),
        (None, "ends 200 bytes too early"),
    ],
)
def test_a_broken_sound_is_named_or_left_out(tmp_path: Path, content: bytes | None, message: str) -> None:
    write_commands(tmp_path)
    bad = tmp_path / "no" / f"{speakers(1, held_out=False)[0]}_nohash_0.wav"
    bad.write_bytes(bad.read_bytes()[:-200] if content is None else content)
    with pytest.raises(ValueError, match=rf"no/{bad.name} cannot be read: .*{message}"):
        from_folder(str(tmp_path), RATE, 4.0, "stop")
    assert len(from_folder(str(tmp_path), RATE, 4.0, "skip").train) == 5


def test_a_sound_of_three_bytes_per_sample_or_without_samples_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(3)
        opened.setframerate(RATE)
        opened.writeframes(b"abcabc")
    with pytest.raises(ValueError, match="24 bits per sample; allowed: 8, 16 or 32"):
        read_sound(tmp_path / "a.wav", RATE)
    write_wav(tmp_path / "b.wav", tone(0.0))
    with pytest.raises(ValueError, match="it holds no sound"):
        read_sound(tmp_path / "b.wav", RATE)


def test_flac_files_are_read(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="FLAC needs soundfile")
    soundfile.write(tmp_path / "a.flac", tone(0.2), RATE)
    assert np.allclose(read_sound(tmp_path / "a.flac", RATE), tone(0.2), atol=0.01)
    (tmp_path / "b.flac").write_bytes(b"fLaC torn")
    with pytest.raises(ValueError, match=r"b\.flac"):
        read_sound(tmp_path / "b.flac", RATE)


# Made utterances.


def test_a_made_utterance_depends_on_seed_and_number_alone() -> None:
    few, many, other = (made("signal", RATE, seed, count) for seed, count in ((0, 4), (0, 8), (1, 4)))
    assert many.train.words[:4] == few.train.words
    assert torch.equal(many.train.frames[: len(few.train.frames)], few.train.frames)
    assert other.train.words != few.train.words
    assert few.source == "signal synthesis"
    assert {word for words in many.held_out.words for word in words} == set(voices.WORDS)
    assert {len(words) for words in many.held_out.words} == {1, 2, 3}


@pytest.mark.skipif(not voices.has_espeak(), reason="espeak-ng is not installed")
def test_espeak_says_a_word_the_same_way_every_time() -> None:
    first = voices.espeak("seven", "en-us")
    assert np.array_equal(first, voices.espeak("seven", "en-us"))
    assert 0.2 < len(first) / voices.ESPEAK_RATE < 1.0
    assert not np.array_equal(first, voices.espeak("seven", "en-us+f2"))


@pytest.mark.skipif(voices.has_espeak(), reason="espeak-ng is installed")
def test_espeak_that_is_missing_is_a_message() -> None:
    with pytest.raises(ValueError, match=r"espeak-ng is not installed .*choose data=signal"):
        voices.espeak("seven", "en-us")


@pytest.mark.skipif(not voices.has_espeak(), reason="espeak-ng is not installed")
def test_a_word_that_gives_no_sound_is_a_message() -> None:
    with pytest.raises(ValueError, match="gave no sound; choose data=signal"):
        voices.espeak(",", "en-us")


# Folders.


def test_a_folder_per_word_is_split_by_speaker(tmp_path: Path) -> None:
    write_commands(tmp_path)
    speech = from_folder(str(tmp_path), RATE, 4.0, "stop")
    assert sorted(speech.train.words) == [("no",)] * 3 + [("yes",)] * 3
    assert sorted(speech.held_out.words) == [("no",), ("yes",)]


def test_the_lists_of_speech_commands_are_kept_to(tmp_path: Path) -> None:
    write_commands(tmp_path)
    names = [f"{speaker}_nohash_0.wav" for speaker in speakers(2, held_out=False)]
    (tmp_path / "validation_list.txt").write_text(f"yes/{names[0]}\n")
    (tmp_path / "testing_list.txt").write_text(f"no/{names[1]}\n")
    speech = from_folder(str(tmp_path), RATE, 4.0, "stop")
    assert (len(speech.train), speech.held_out.words) == (6, (("yes",),))


def test_transcripts_like_those_of_librispeech_are_split_by_speaker_or_by_folder(tmp_path: Path) -> None:
    inside, outside = speakers(1, held_out=False)[0], speakers(1, held_out=True)[0]
    write_librispeech(tmp_path, f"{inside}/{inside}-1", {f"{inside}-1-0000": "GO ON", f"{inside}-1-0001": "STOP"})
    write_librispeech(tmp_path, f"{outside}/{outside}-1", {f"{outside}-1-0000": "WHO"})
    speech = from_folder(str(tmp_path), RATE, 4.0, "stop")
    assert (speech.train.words, speech.held_out.words) == ((("go", "on"), ("stop",)), (("who",),))
    other = tmp_path / "split"
    write_librispeech(other, "train-clean-5/1/1-1", {"1-1-0": "A B"})
    write_librispeech(other, "dev-clean/2/2-1", {"2-1-0": "C"})
    write_librispeech(other, "test-clean/3/3-1", {"3-1-0": "D"})
    speech = from_folder(str(other), RATE, 4.0, "stop")
    assert (speech.train.words, speech.held_out.words) == ((("a", "b"),), (("c",),))
    (other / "train-clean-5" / "1" / "1-1" / "1-1-0.wav").unlink()
    pytest.importorskip("soundfile", reason="a file that is no WAV file is looked for as FLAC")
    with pytest.raises(ValueError, match=r"1-1-0\.flac cannot be read"):
        from_folder(str(other), RATE, 3.9, "stop")


def test_a_torn_transcript_is_named(tmp_path: Path) -> None:
    write_librispeech(tmp_path, "1/1-1", {"1-1-0": ""})
    with pytest.raises(ValueError, match=r"1-1\.trans\.txt cannot be read: line 1 is not a name and what is said"):
        from_folder(str(tmp_path), RATE, 4.0, "stop")


def test_too_long_utterances_are_left_out_and_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable training utterance among 0 files .*needed: folders of one word"):
        from_folder(str(tmp_path), RATE, 4.0, "stop")
    write_commands(tmp_path)
    write_wav(tmp_path / "no" / f"{speakers(1, held_out=False)[0]}_nohash_0.wav", tone(2.0))
    assert len(from_folder(str(tmp_path), RATE, 1.0, "stop").train) == 5
    with pytest.raises(ValueError, match=r"8 longer than max_seconds=0\.1"):
        from_folder(str(tmp_path), RATE, 0.1, "stop")


# The job.


def test_padding_is_silence_and_the_same_whatever_the_batch_holds() -> None:
    job = speech_job()
    frames, targets, lengths = job.batch(range(24), CPU)
    part = job.speech.train
    mean, std = job._mean_and_std
    silence = (torch.tensor(np.log(1e-4), dtype=torch.float16).float() - mean) / std
    for i in range(24):
        said = part.words[i]
        assert [job.units[unit - 1] for unit in targets[i, : lengths[i]].tolist()] == list(said)
        assert torch.allclose(frames[i, part.length[i] :], silence, atol=1e-2)
    assert frames.shape[1] % 4 == 0


def test_letters_are_written_and_read_back() -> None:
    job = speech_job(units="letters")
    _, targets, lengths = job.batch([0], CPU)
    written = [unit for unit in targets[0, : lengths[0]].tolist() for _ in range(2)]
    # Between equal letters a blank keeps them apart; everything else may repeat.
    spaced = [unit for pair in zip(written, [0] * len(written), strict=True) for unit in pair]
    words = job._words([unit for i, unit in enumerate(spaced) if i % 4 != 1])
    assert words == job.speech.train.words[0]
    terms = job.loss(job.build_model(), job.batch([0, 1], CPU))
    assert terms.num_elements == 2
    assert job.evaluate(job.build_model(), CPU)["val_word_error_rate"] >= 0


def test_too_many_words_ask_for_letters() -> None:
    job = speech_job()
    job.__dict__["units"] = tuple(str(i) for i in range(2001))
    with pytest.raises(ValueError, match="2001 different words; allowed with units=words: 2000; choose units=letters"):
        job.prepare()


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a c", 1),
        ("a b", "", 2),
        ("", "a", 1),
        ("a b c", "b c d", 2),
        ("a b", "b a", 2),
    ],
)
def test_edit_distance_counts_words(said: str, heard: str, errors: int) -> None:
    assert edit_distance(tuple(said.split()), tuple(heard.split())) == errors
