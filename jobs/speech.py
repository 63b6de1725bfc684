"""The `speech` job: words from sound, by convolutions, a transformer and CTC.

A sample is one utterance, padded with silence to the longest one, so that what a batch holds beside it does not matter.
Data are made here or come from a folder (`jobs.speech_data`). Knows nothing of how it is run.

Shapes: B samples, T frames, M bands, P positions (a quarter of the frames), D features, V units and the blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.job import LossTerms, SampleReader
from orchestrator.jobs.optim import adamw
from orchestrator.jobs.speech_data import FLOOR, NUM_MELS, Part, Speech, Words, from_folder, made
from orchestrator.jobs.transformer import INIT_STD, Block, init_weights

BETAS = (0.9, 0.98)
EVAL_BATCH = 32
"""Held-out utterances per forward pass; bounds the memory of an evaluation."""

BLANK = 0
LETTERS = " abcdefghijklmnopqrstuvwxyz'"
MAX_VOCABULARY = 2000
"""Different words up to which they may be units of their own."""

STRIDE = 4


class Recogniser(nn.Module):
    """Two convolutions that halve the time, transformer blocks, and a logit per unit and position."""

    def __init__(self, *, width: int, layers: int, heads: int, num_positions: int, num_units: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(NUM_MELS, width, 5, stride=2, padding=2)
        self.conv_out = nn.Conv1d(width, width, 5, stride=2, padding=2)
        self.positions = nn.Embedding(num_positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, is_causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_units)
        init_weights(self, INIT_STD, INIT_STD / math.sqrt(2 * layers))

    def forward(self, frames_BTM: Tensor) -> Tensor:
        """Logits of all positions, samples one after another; (B, T, M) to (B * P, V)."""
        x_BDT = F.gelu(self.conv_in(frames_BTM.transpose(1, 2)))
        x_BPD = F.gelu(self.conv_out(x_BDT)).transpose(1, 2)
        x_BPD = x_BPD + self.positions(torch.arange(x_BPD.shape[1], device=x_BPD.device))
        for block in self.blocks:
            x_BPD = block(x_BPD)
        # Flat before the head: of three dimensions a Linear returns a view, which FSDP2 warns about in a root module.
        return cast(Tensor, self.head(self.norm(x_BPD).flatten(0, 1)))


class SpeechJob:
    """Recognition of words; the metric is the word error rate over held-out utterances."""

    name: str = "speech"
    metric: str = "val_word_error_rate"
    clip_norm = 1.0
    warmup_steps = 20
    reader: SampleReader | None = None

    def __init__(  # noqa: PLR0913 - one argument per parameter of the table
        self,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        units: str = "words",
        rate: int = 8000,
        max_seconds: float = 4.0,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        max_samples: int | None = None,
        eval_samples: int = 192,
        data: str = "auto",
        data_dir: str | None = None,
        on_bad_file: str = "stop",
        seed: int = 0,
    ) -> None:
        self._width, self._layers, self._heads, self._units = width, layers, heads, units
        self._rate, self._max_seconds, self._lr, self._weight_decay = rate, max_seconds, lr, weight_decay
        self._max_samples, self._eval_samples = max_samples, eval_samples
        self._data, self._data_dir, self._on_bad_file, self._seed = data, data_dir, on_bad_file, seed

    @cached_property
    def speech(self) -> Speech:
        """The utterances, loaded or made on first use."""
        if self._data_dir is not None:
            return from_folder(self._data_dir, self._rate, self._max_seconds, self._on_bad_file)
        return made(self._data, self._rate, self._seed, self._max_samples)

    @property
    def num_train_samples(self) -> int:
        """Training utterances; loads them."""
        return len(self.speech.train) if self._max_samples is None else min(self._max_samples, len(self.speech.train))

    def prepare(self) -> None:
        """Load the utterances and check that every training one can be written in units.

        Raises:
            ValueError: the data cannot be loaded or made, or there are too many different words.
        """
        if self._units == "words" and len(self.units) > MAX_VOCABULARY:
            raise ValueError(
                f"job speech: {len(self.units)} different words; allowed with units=words: {MAX_VOCABULARY}; "
                f"choose units=letters"
            )
        _ = self._targets, self._mean_and_std

    @cached_property
    def units(self) -> tuple[str, ...]:
        """What the network tells apart: the words of the training part, or letters. Unit i has logit i + 1."""
        if self._units == "letters":
            return tuple(LETTERS)
        return tuple(sorted({word for words in self.speech.train.words for word in words}))

    def build_model(self) -> nn.Module:
        """A fresh fp32 `Recogniser` on the default device."""
        return Recogniser(
            width=self._width,
            layers=self._layers,
            heads=self._heads,
            num_positions=self._num_frames // STRIDE,
            num_units=len(self.units) + 1,
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks."""
        return list(cast(Recogniser, model).blocks)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW at the base learning rate."""
        return adamw(model, lr=self._lr, betas=BETAS, weight_decay=self._weight_decay)

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """Frames (B, T, M) fp32, targets (B, L) int64 and their lengths (B,), on `device`."""
        chosen = torch.tensor(indices, dtype=torch.int64, device="cpu")
        targets, lengths = self._targets
        return self._frames(self.speech.train, chosen, device), targets[chosen].to(device), lengths[chosen].to(device)

    def num_elements(self, num_samples: int) -> int:
        """One loss element per utterance."""
        return num_samples

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """CTC loss in nats, summed over utterances; one too short for its words counts as zero.

        Source: Graves et al. 2006.
        """
        frames_BTM, targets_BL, lengths_B = batch
        logits_BPV = model(frames_BTM).float().view(len(frames_BTM), -1, len(self.units) + 1)
        return LossTerms(loss_sum=self._ctc(logits_BPV, targets_BL, lengths_B), num_elements=len(frames_BTM))

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Word error rate of the likeliest units, and nats per utterance, over utterances spread evenly."""
        part = self.speech.held_out
        count = min(self._eval_samples, len(part))
        chosen = torch.linspace(0, len(part) - 1, count, dtype=torch.float64, device="cpu").long()
        targets, lengths = self._encoded(part)
        was_training = model.training
        model.eval()
        sums, heard = [], []
        with torch.no_grad():
            for piece in torch.split(chosen, EVAL_BATCH):
                logits = model(self._frames(part, piece, device)).float().view(len(piece), -1, len(self.units) + 1)
                sums.append(self._ctc(logits, targets[piece].to(device), lengths[piece].to(device)))
                heard += [self._words(best) for best in logits.argmax(dim=2).cpu().tolist()]
        model.train(was_training)
        said = [part.words[number] for number in chosen.tolist()]
        errors = sum(edit_distance(a, b) for a, b in zip(said, heard, strict=True))
        nats = torch.stack(sums).double().cpu().sum().item() / count
        return {"val_word_error_rate": errors / sum(map(len, said)), "val_loss": nats}

    @staticmethod
    def _ctc(logits_BPV: Tensor, targets_BL: Tensor, lengths_B: Tensor) -> Tensor:
        B, P, _ = logits_BPV.shape
        if not B:
            return logits_BPV.sum()  # CTC takes no empty batch
        positions_B = torch.full((B,), P, dtype=torch.int64, device=logits_BPV.device)
        log_probs = logits_BPV.log_softmax(dim=2).transpose(0, 1)
        return F.ctc_loss(
            log_probs, targets_BL, positions_B, lengths_B, blank=BLANK, reduction="sum", zero_infinity=True
        )

    @cached_property
    def _targets(self) -> tuple[Tensor, Tensor]:
        return self._encoded(self.speech.train)

    def _encoded(self, part: Part) -> tuple[Tensor, Tensor]:
        """Units of each utterance (N, L) padded with the blank, and how many (N,). Unknown units are left out."""
        number = {unit: i + 1 for i, unit in enumerate(self.units)}
        rows = []
        for words in part.words:
            units = words if self._units == "words" else " ".join(words)
            rows.append(
                torch.tensor([number[unit] for unit in units if unit in number], dtype=torch.int64, device="cpu")
            )
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=BLANK), lengths

    def _words(self, best: list[int]) -> Words:
        """The words that a sequence of likeliest units stands for: repetitions and blanks go."""
        kept = [unit for i, unit in enumerate(best) if unit != BLANK and (not i or best[i - 1] != unit)]
        units = [self.units[unit - 1] for unit in kept]
        return tuple(units) if self._units == "words" else tuple("".join(units).split())

    @cached_property
    def _num_frames(self) -> int:
        """Frames that every utterance is padded to: the longest one's, a whole number of strides."""
        longest = max(int(part.length.max()) for part in (self.speech.train, self.speech.held_out))
        return -(-longest // STRIDE) * STRIDE

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each band over the training frames, each (M,) fp32."""
        frames = self.speech.train.frames
        values = frames[:: max(1, len(frames) // 200_000)].double()
        return values.mean(dim=0).float(), values.std(dim=0).float().clamp_min(0.1)

    def _frames(self, part: Part, chosen: Tensor, device: torch.device) -> Tensor:
        """Normalised frames (B, T, M) fp32, silence behind the end."""
        places = torch.arange(self._num_frames, device="cpu")
        inside = places < part.length[chosen, None]
        rows = torch.where(inside, part.first[chosen, None] + places, 0)
        frames = torch.where(inside[:, :, None], part.frames[rows], math.log(FLOOR)).to(device).float()
        mean, std = self._mean_and_std
        return (frames - mean.to(device)) / std.to(device)


def edit_distance(said: Words, heard: Words) -> int:
    """Words to insert, delete or replace to make one out of the other."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]
