"""The `tissue` job: a small U-Net that marks a structure in medical pictures, pixel by pixel.

A sample is a square patch. Data are pictures that come with scikit-image, whose masks are computed and not drawn by a
physician, cells drawn here with exact masks, or a folder of pictures and masks. Knows nothing of how it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.job import LossTerms, SampleReader
from orchestrator.jobs.optim import adamw
from orchestrator.jobs.tissue_data import Tissue, bundled, from_folder, iterate
from orchestrator.jobs.vision import UNet

BETAS = (0.9, 0.95)
EVAL_BATCH = 64
"""Held-out patches per forward pass; bounds the memory of an evaluation."""


class TissueJob:
    """Segmentation of one structure; the metric is Dice's coefficient over all held-out pixels."""

    name: str = "tissue"
    metric: str = "val_dice"
    clip_norm = 1.0
    warmup_steps = 20
    reader: SampleReader | None = None

    def __init__(  # noqa: PLR0913 - one argument per parameter of the table
        self,
        *,
        width: int = 8,
        levels: int = 3,
        size: int = 32,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        data: str = "ihc",
        data_dir: str | None = None,
        on_bad_file: str = "stop",
        seed: int = 0,
    ) -> None:
        self._width, self._levels, self._size = width, levels, size
        self._lr, self._weight_decay = lr, weight_decay
        self._data, self._data_dir, self._on_bad_file, self._seed = data, data_dir, on_bad_file, seed

    @cached_property
    def tissue(self) -> Tissue:
        """The patches of both parts, loaded on first use."""
        if self._data_dir is not None:
            return from_folder(self._data_dir, self._size, self._on_bad_file)
        return bundled(self._data, self._size, self._seed)

    @property
    def num_train_samples(self) -> int:
        """Training patches; loads the pictures."""
        return len(self.tissue.train)

    def prepare(self) -> None:
        """Load the pictures and check that the network can halve a patch often enough.

        Raises:
            ValueError: the data cannot be loaded, or the size does not fit the levels.
        """
        if self._size % (1 << self._levels):
            raise ValueError(
                f"job tissue: size={self._size} cannot be halved levels={self._levels} times; "
                f"allowed: a multiple of {1 << self._levels}, or fewer levels"
            )
        _ = self._mean_and_std

    def build_model(self) -> nn.Module:
        """A fresh fp32 `UNet` on the default device."""
        return UNet(channels=3, width=self._width, levels=self._levels)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The pairs of convolutions, down and up."""
        return list(cast(UNet, model).blocks)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW at the base learning rate."""
        return adamw(model, lr=self._lr, betas=BETAS, weight_decay=self._weight_decay)

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """Normalised patches (B, 3, S, S) fp32 and masks (B, S, S) fp32 of those numbers, on `device`."""
        pixels, mask = self.tissue.train.cut(torch.tensor(indices, dtype=torch.int64, device="cpu"))
        return self._normalised(pixels, device), mask.to(device).float()

    def num_elements(self, num_samples: int) -> int:
        """Pixels of that many patches."""
        return num_samples * self._size * self._size

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """Cross-entropy in nats, summed over all pixels of the batch."""
        images, masks = batch
        loss_sum = F.binary_cross_entropy_with_logits(model(images).float().squeeze(1), masks, reduction="sum")
        return LossTerms(loss_sum=loss_sum, num_elements=masks.numel())

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Dice, the share of marked pixels, and nats per pixel over the whole held-out part."""
        was_training = model.training
        model.eval()
        sums = []
        with torch.no_grad():
            for pixels, mask in iterate(self.tissue.held_out, EVAL_BATCH):
                logits, truth = model(self._normalised(pixels, device)).float().squeeze(1), mask.to(device).float()
                marked = (logits > 0).float()
                nats = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
                sums.append(torch.stack([(marked * truth).sum(), marked.sum(), truth.sum(), nats]))
        model.train(was_training)
        both, marked_sum, truth_sum, nats_sum = torch.stack(sums).double().cpu().sum(dim=0).tolist()
        num_pixels = self.num_elements(len(self.tissue.held_out))
        # Nothing to find and nothing marked is a perfect answer.
        dice = 2 * both / (marked_sum + truth_sum) if marked_sum + truth_sum else 1.0
        return {"val_dice": dice, "val_marked_ratio": marked_sum / num_pixels, "val_loss": nats_sum / num_pixels}

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each colour over the training pictures, each (3, 1, 1) fp32."""
        pixels = self.tissue.train.pixels
        values = pixels[:: max(1, len(pixels) // 1_000_000)].double()
        mean, std = values.mean(dim=0), values.std(dim=0)
        return mean.float()[:, None, None], std.float().clamp_min(1.0)[:, None, None]

    def _normalised(self, pixels: Tensor, device: torch.device) -> Tensor:
        mean, std = self._mean_and_std
        return (pixels.to(device).float() - mean.to(device)) / std.to(device)
