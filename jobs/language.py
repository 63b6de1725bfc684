"""The `language` job: a byte-level GPT on the running Python's standard library, or on text of one's own.

A sample is a window of `context` + 1 bytes; windows do not overlap, and sample i is window i. The text lies in memory,
or, with `shuffle_block`, is read from disk while the model trains. Sizes to try,
set by `width`, `layers`, `heads` and `context`, are listed in this package's README. Knows nothing of ranks, shares or
precision; every matrix product is a plain `nn.Linear` so that the orchestrator may swap it for one with a tier.

Shapes: B samples, T positions, N = B * T, D features, V = 256 byte values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.corpus import Corpus, as_tensor, load_corpus, standard_library
from orchestrator.jobs.data import Indices
from orchestrator.jobs.job import LossTerms, SampleReader
from orchestrator.jobs.loading import StreamReader
from orchestrator.jobs.optim import adamw
from orchestrator.jobs.text_stream import TextStream, open_text
from orchestrator.jobs.transformer import INIT_STD, Block, init_weights

NUM_BYTE_VALUES = 256
EVAL_BATCH = 64
"""Held-out windows per forward pass; bounds the memory of an evaluation."""


class ByteGpt(nn.Module):
    """Pre-norm GPT over bytes with learned positions and an own output matrix."""

    def __init__(self, *, width: int, layers: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.bytes = nn.Embedding(NUM_BYTE_VALUES, width)
        self.positions = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, is_causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTE_VALUES)
        init_weights(self, INIT_STD, INIT_STD / math.sqrt(2 * layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next byte at every position, samples one after another; (B, T) to (N, V)."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.drop(self.bytes(tokens_BT) + self.positions(positions_T))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        # Flat before the head: of three dimensions a Linear returns a view, which FSDP2 warns about in a root module.
        return cast(Tensor, self.head(self.norm(x_BTD).flatten(0, 1)))


class LanguageJob:
    """Next-byte prediction on text; the metric is nats per held-out byte."""

    name: str = "language"
    metric: str = "val_loss"
    clip_norm = 1.0
    warmup_steps = 20

    def __init__(  # noqa: PLR0913 - one argument per parameter of the table
        self,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = 64,
        dropout: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eval_windows: int = 256,
        max_bytes: int | None = None,
        shuffle_block: int | None = None,
        data_dir: str | None = None,
        on_bad_file: str = "stop",
    ) -> None:
        self._width, self._layers, self._heads, self._context = width, layers, heads, context
        self._dropout, self._lr, self._weight_decay, self._betas = dropout, lr, weight_decay, (beta1, beta2)
        self._eval_windows, self._max_bytes = eval_windows, max_bytes
        self._data_dir, self._on_bad_file = data_dir, on_bad_file
        self._stream = None if shuffle_block is None else StreamReader(self._windows_from, window=shuffle_block)

    @property
    def reader(self) -> SampleReader | None:
        """What reads the text while it trains; None where it lies in memory."""
        return self._stream

    @cached_property
    def corpus(self) -> Corpus:
        """The text in memory, loaded on first use."""
        return load_corpus(self._data_dir, self._max_bytes, self._on_bad_file)

    @cached_property
    def text(self) -> Corpus | TextStream:
        """The text, in memory or on disk; looked through on first use."""
        return self.corpus if self._stream is None else open_text(self._data_dir, self._max_bytes, self._on_bad_file)

    @property
    def num_train_samples(self) -> int:
        """Training windows; loads the text."""
        return self.text.num_train_bytes // (self._context + 1)

    @property
    def num_eval_samples(self) -> int:
        """Held-out windows that an evaluation looks at; loads the text."""
        return min(self._eval_windows, len(self._windows(self.text.held_out)))

    def prepare(self) -> None:
        """Load the text and check that both parts hold a window.

        Raises:
            ValueError: a part is shorter than one window, or the text cannot be read.
        """
        text = self.text
        for part, num_bytes in (("training", text.num_train_bytes), ("held-out", len(text.held_out))):
            if num_bytes <= self._context:
                where = self._data_dir or standard_library()
                raise ValueError(
                    f"job language: {num_bytes} bytes of {part} text in {where} are less than one window; "
                    f"needed: context + 1 = {self._context + 1}; lower context, raise max_bytes or change data_dir"
                )

    def build_model(self) -> nn.Module:
        """A fresh fp32 `ByteGpt` on the default device."""
        return ByteGpt(
            width=self._width,
            layers=self._layers,
            heads=self._heads,
            context=self._context,
            dropout=self._dropout,
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks."""
        return list(cast(ByteGpt, model).blocks)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW at the base learning rate."""
        return adamw(model, lr=self._lr, betas=self._betas, weight_decay=self._weight_decay)

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """Inputs and targets of the windows of those numbers, each (B, context) int64 on `device`."""
        if self._stream is not None:
            read = bytearray().join(self._stream.fetch(indices))
            windows = as_tensor(read).view(len(indices), self._context + 1)
            return self._inputs_and_targets(windows, torch.arange(len(windows), device="cpu"), device)
        return self._inputs_and_targets(
            self._windows(self.corpus.train), torch.tensor(indices, dtype=torch.int64, device="cpu"), device
        )

    def num_elements(self, num_samples: int) -> int:
        """Bytes predicted in that many windows."""
        return num_samples * self._context

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """Cross-entropy in nats, summed over all bytes of the batch."""
        inputs_BT, targets_BT = batch
        logits_NV = model(inputs_BT)
        loss_sum = F.cross_entropy(logits_NV.float(), targets_BT.flatten(), reduction="sum")
        return LossTerms(loss_sum=loss_sum, num_elements=targets_BT.numel())

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats and bits per byte over windows spread evenly over the held-out text; the same ones every time."""
        windows = self._windows(self.text.held_out)
        chosen = torch.linspace(0, len(windows) - 1, self.num_eval_samples, dtype=torch.float64, device="cpu").long()
        was_training = model.training
        model.eval()
        sums, num_elements = [], 0
        with torch.no_grad():
            for part in torch.split(chosen, EVAL_BATCH):
                terms = self.loss(model, self._inputs_and_targets(windows, part, device))
                sums.append(terms.loss_sum)
                num_elements += terms.num_elements
        model.train(was_training)
        nats = torch.stack(sums).double().cpu().sum().item() / num_elements
        return {"val_loss": nats, "val_bits_per_byte": nats / math.log(2)}

    def _windows_from(self, first: int) -> Iterator[bytes]:
        """Training windows from that number on, as they are read."""
        assert isinstance(self.text, TextStream)
        return self.text.windows_from(first, self._context + 1)

    def _windows(self, text: Tensor) -> Tensor:
        """All windows of a text as a view, (num_windows, context + 1) uint8; what is left at the end is unused."""
        size = self._context + 1
        return text[: len(text) // size * size].view(-1, size)

    @staticmethod
    def _inputs_and_targets(windows: Tensor, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        # Moved as bytes and widened there: an eighth of the traffic.
        window_BT = windows[indices].to(device).long()
        return window_BT[:, :-1], window_BT[:, 1:]
