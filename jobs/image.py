"""The `image` job: classification of pictures by a small vision transformer or residual network.

Data are the digits that come with scikit-learn, shapes drawn here, or a folder of one's own: CIFAR files, or a folder
of pictures per class, in memory or, with `loader_processes`, decoded while it trains. A sample is one picture. Knows
nothing of how it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.image_data import LabelledImages, digits, from_folder, has_cifar, shapes
from orchestrator.jobs.image_files import LoadedPictures, look_through
from orchestrator.jobs.job import LossTerms, SampleReader
from orchestrator.jobs.optim import adamw
from orchestrator.jobs.vision import ResidualNet, VisionTransformer

BETAS = (0.9, 0.95)
EVAL_BATCH = 128
"""Held-out pictures per forward pass; bounds the memory of an evaluation."""


class ImageJob:
    """Classification of pictures; the metric is the share of held-out pictures that are named rightly."""

    name: str = "image"
    metric: str = "val_accuracy"
    clip_norm = 1.0
    warmup_steps = 20

    def __init__(  # noqa: PLR0913 - one argument per parameter of the table
        self,
        *,
        model: str = "vit",
        width: int = 48,
        layers: int = 3,
        heads: int = 4,
        patch: int = 2,
        size: int | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        max_samples: int | None = None,
        eval_samples: int = 1024,
        loader_processes: int = 0,
        data: str = "digits",
        data_dir: str | None = None,
        on_bad_file: str = "stop",
        seed: int = 0,
    ) -> None:
        self._model, self._width, self._layers, self._heads, self._patch = model, width, layers, heads, patch
        self._size, self._lr, self._weight_decay = size, lr, weight_decay
        self._max_samples, self._eval_samples = max_samples, eval_samples
        self._data, self._data_dir, self._on_bad_file, self._seed = data, data_dir, on_bad_file, seed
        self._loader_processes = loader_processes
        self._reader: SampleReader | None = None

    @property
    def reader(self) -> SampleReader | None:
        """What reads pictures while it trains; None where they lie in memory, and before they are looked through."""
        return self._reader

    @cached_property
    def images(self) -> LabelledImages | LoadedPictures:
        """The pictures, loaded or looked through on first use."""
        if self._data_dir is not None:
            if self._loader_processes and not has_cifar(self._data_dir):
                files = look_through(
                    self._data_dir, self._size, self._on_bad_file, self._max_samples, self._eval_samples
                )
                loaded = LoadedPictures(files, self._loader_processes)
                self._reader = loaded.loader
                return loaded
            return from_folder(self._data_dir, self._size, self._on_bad_file, self._max_samples)
        if self._data == "shapes":
            return shapes(self._seed, self._size, self._max_samples)
        return digits(self._size).first(self._max_samples)

    @property
    def num_train_samples(self) -> int:
        """Training pictures; loads them."""
        return len(self.images)

    def prepare(self) -> None:
        """Load the pictures and check that the model can be made for them.

        Raises:
            ValueError: the data cannot be loaded, or its side is no multiple of the patch.
        """
        _, side = self.images.shape
        if self._model == "vit" and side % self._patch:
            raise ValueError(
                f"job image: pictures of {side} x {side} pixels cannot be cut into patches of {self._patch}; "
                f"choose a patch that divides {side}, or another size"
            )
        _ = self._mean_and_std

    def build_model(self) -> nn.Module:
        """A fresh fp32 network on the default device."""
        images = self.images
        (channels, side), num_classes = images.shape, len(images.classes)
        if self._model == "resnet":
            return ResidualNet(
                channels=channels, width=self._width, blocks_per_stage=self._layers, num_classes=num_classes
            )
        return VisionTransformer(
            channels=channels,
            side=side,
            patch=self._patch,
            width=self._width,
            layers=self._layers,
            heads=self._heads,
            num_classes=num_classes,
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer or residual blocks."""
        return list(cast(VisionTransformer | ResidualNet, model).blocks)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW at the base learning rate."""
        return adamw(model, lr=self._lr, betas=BETAS, weight_decay=self._weight_decay)

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """Normalised pictures (B, C, S, S) fp32 and labels (B,) of those numbers, on `device`."""
        pixels, labels = self.images.cut(torch.tensor(indices, dtype=torch.int64, device="cpu"))
        return self._normalised(pixels, device), labels.to(device)

    def num_elements(self, num_samples: int) -> int:
        """One loss element per picture."""
        return num_samples

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """Cross-entropy in nats, summed over the pictures of the batch."""
        images, labels = batch
        loss_sum = F.cross_entropy(model(images).float(), labels, reduction="sum")
        return LossTerms(loss_sum=loss_sum, num_elements=len(labels))

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats per picture and the share named rightly, over held-out pictures spread evenly; the same every time."""
        images = self.images
        count = min(self._eval_samples, len(images.held_out))
        chosen = torch.linspace(0, len(images.held_out) - 1, count, dtype=torch.float64, device="cpu").long()
        was_training = model.training
        model.eval()
        logits = []
        with torch.no_grad():
            for part in torch.split(chosen, EVAL_BATCH):
                logits.append(model(self._normalised(images.held_out[part], device)).float().cpu())
        model.train(was_training)
        labels, all_logits = images.held_out_labels[chosen], torch.cat(logits)
        num_right = (all_logits.argmax(dim=1) == labels).sum().item()
        return {"val_accuracy": num_right / count, "val_loss": F.cross_entropy(all_logits, labels).item()}

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        return self.images.mean_and_std

    def _normalised(self, images: Tensor, device: torch.device) -> Tensor:
        # Moved as bytes and widened there: a quarter of the traffic.
        mean, std = self._mean_and_std
        return (images.to(device).float() - mean.to(device)) / std.to(device)
