"""The `genome` job: which of two classes a piece of DNA or RNA belongs to, by convolutions along it.

A sample is one sequence of `length` letters, shorter ones filled up, so that what a batch holds beside it does not
matter. Data are made here, with a best possible answer that is known, or are two FASTA files (`jobs.genome_data`).
Knows nothing of how it is run.

Shapes: B samples, L letters, C kinds of letters, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.genome_data import NUM_LETTERS, Genome, area_under_curve, from_folder, planted
from orchestrator.jobs.job import LossTerms, SampleReader
from orchestrator.jobs.optim import adamw
from orchestrator.jobs.vision import group_norm

BETAS = (0.9, 0.95)
EVAL_BATCH = 256
"""Held-out sequences per forward pass; bounds the memory of an evaluation."""

KERNEL = 11
BLOCK_KERNEL = 5


class ResidualConv(nn.Module):
    """One convolution along the sequence beside a shortcut, normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.conv = nn.Conv1d(width, width, BLOCK_KERNEL, padding=BLOCK_KERNEL // 2)

    def forward(self, x_BDL: Tensor) -> Tensor:
        """(B, D, L) to the same shape."""
        return x_BDL + cast(Tensor, self.conv(F.relu(self.norm(x_BDL))))


class MotifNet(nn.Module):
    """A convolution as wide as a motif, residual ones, the strongest answer along the sequence, a head.

    Source: Alipanahi et al. 2015 (DeepBind); the residual convolutions and GroupNorm are added.
    """

    def __init__(self, *, width: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(NUM_LETTERS, width, KERNEL, padding=KERNEL // 2)
        self.blocks = nn.ModuleList(ResidualConv(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, letters_BCL: Tensor) -> Tensor:
        """Logit of class 1; (B, C, L) to (B, 1)."""
        x_BDL = self.stem(letters_BCL)
        for block in self.blocks:
            x_BDL = block(x_BDL)
        return cast(Tensor, self.head(self.norm(x_BDL.amax(dim=2))))


class GenomeJob:
    """Two classes of sequences; the metric is the area under the ROC curve over held-out ones."""

    name: str = "genome"
    metric: str = "val_auc"
    clip_norm = 1.0
    warmup_steps = 20
    reader: SampleReader | None = None

    def __init__(  # noqa: PLR0913 - one argument per parameter of the table
        self,
        *,
        width: int = 32,
        layers: int = 1,
        length: int = 64,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        max_samples: int | None = None,
        eval_samples: int = 2048,
        data_dir: str | None = None,
        on_bad_file: str = "stop",
        seed: int = 0,
    ) -> None:
        self._width, self._layers, self._length = width, layers, length
        self._lr, self._weight_decay = lr, weight_decay
        self._max_samples, self._eval_samples = max_samples, eval_samples
        self._data_dir, self._on_bad_file, self._seed = data_dir, on_bad_file, seed

    @cached_property
    def genome(self) -> Genome:
        """The sequences of both parts, loaded or made on first use."""
        if self._data_dir is not None:
            return from_folder(self._data_dir, self._length, self._on_bad_file)
        return planted(self._length, self._seed)

    @property
    def num_train_samples(self) -> int:
        """Training sequences; loads them."""
        return len(self.genome.train) if self._max_samples is None else min(self._max_samples, len(self.genome.train))

    def prepare(self) -> None:
        """Load the sequences.

        Raises:
            ValueError: they cannot be loaded, or are shorter than a motif.
        """
        _ = self.genome

    def build_model(self) -> nn.Module:
        """A fresh fp32 `MotifNet` on the default device."""
        return MotifNet(width=self._width, layers=self._layers)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The residual convolutions."""
        return list(cast(MotifNet, model).blocks)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW at the base learning rate."""
        return adamw(model, lr=self._lr, betas=BETAS, weight_decay=self._weight_decay)

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """Letters (B, C, L) fp32, one of C being one and none where unknown, and classes (B,) fp32, on `device`."""
        chosen = torch.tensor(indices, dtype=torch.int64, device="cpu")
        train = self.genome.train
        return self._letters(train.codes[chosen], device), train.label[chosen].to(device).float()

    def num_elements(self, num_samples: int) -> int:
        """One loss element per sequence."""
        return num_samples

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """Cross-entropy in nats, summed over sequences."""
        letters_BCL, label_B = batch
        logits_B = model(letters_BCL).float().squeeze(1)
        loss_sum = F.binary_cross_entropy_with_logits(logits_B, label_B, reduction="sum")
        return LossTerms(loss_sum=loss_sum, num_elements=len(label_B))

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """AUC and nats per sequence over held-out sequences spread evenly, and the best AUC there is where known."""
        part = self.genome.held_out
        count = min(self._eval_samples, len(part))
        # From the first to the last: they are of different classes, so both are among any two.
        chosen = torch.linspace(0, len(part) - 1, count, dtype=torch.float64, device="cpu").long()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            pieces = torch.split(part.codes[chosen], EVAL_BATCH)
            logits = torch.cat([model(self._letters(piece, device)).float().squeeze(1) for piece in pieces])
        model.train(was_training)
        logits, label = logits.double().cpu(), part.label[chosen]
        nats = F.binary_cross_entropy_with_logits(logits, label.double())
        found = {"val_auc": area_under_curve(logits, label), "val_loss": nats.item()}
        return found if self.genome.best_auc is None else found | {"val_best_auc": self.genome.best_auc}

    @staticmethod
    def _letters(codes_BL: Tensor, device: torch.device) -> Tensor:
        kinds = torch.arange(NUM_LETTERS, dtype=torch.uint8, device=device)
        # Moved as bytes and widened there: a sixteenth of the traffic.
        return (codes_BL.to(device)[:, None, :] == kinds[:, None]).float()
