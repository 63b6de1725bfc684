"""The `mlp` job: a multi-layer perceptron on synthetic classes, the smallest job there is; for tests and first tries.

The data follows from `seed` and the sample number alone: inputs are normal, labels come from a fixed random network,
one in ten is replaced at random so that the gradient never becomes free of noise. Knows nothing of how it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.jobs.data import Indices
from orchestrator.jobs.job import LossTerms, SampleReader

NUM_INPUTS = 16
NUM_CLASSES = 8
NUM_HELD_OUT = 512
TEACHER_WIDTH = 32
WRONG_LABEL_RATIO = 0.1
MOMENTUM = 0.9


@lru_cache(maxsize=8)
def synthetic_classes(seed: int, part: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Inputs (num_samples, 16) fp32 and labels (num_samples,) int64 of one part (0 training, 1 held-out).

    The first n samples are the same whatever `num_samples` is, and torch's generators are left alone.
    """
    teacher = np.random.default_rng([seed, 0])
    first = teacher.standard_normal((NUM_INPUTS, TEACHER_WIDTH)) / np.sqrt(NUM_INPUTS)
    second = teacher.standard_normal((TEACHER_WIDTH, NUM_CLASSES))
    inputs = np.random.default_rng([seed, 1, part]).standard_normal((num_samples, NUM_INPUTS), dtype=np.float32)
    labels = (np.tanh(2.0 * inputs @ first) @ second).argmax(axis=1)
    noise = np.random.default_rng([seed, 2, part]).random((num_samples, 2))
    random_labels = (noise[:, 1] * NUM_CLASSES).astype(np.int64)
    labels = np.where(noise[:, 0] < WRONG_LABEL_RATIO, random_labels, labels)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


class HiddenLayer(nn.Module):
    """A linear layer and its non-linearity."""

    def __init__(self, num_inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_inputs) to (B, width)."""
        return F.gelu(self.linear(x))


class Mlp(nn.Module):
    """Hidden layers in a row and a linear head."""

    def __init__(self, *, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HiddenLayer(NUM_INPUTS if i == 0 else width, width) for i in range(depth))
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes; (B, 16) to (B, 8)."""
        for layer in self.layers:
            x = layer(x)
        return cast(Tensor, self.head(x))


class MlpJob:
    """Classification of synthetic points; the metric is nats per held-out sample."""

    name: str = "mlp"
    metric: str = "val_loss"
    clip_norm = 1.0
    warmup_steps = 20
    reader: SampleReader | None = None

    def __init__(
        self, *, width: int = 32, depth: int = 2, lr: float = 0.05, num_samples: int = 4096, seed: int = 0
    ) -> None:
        self._width, self._depth, self._lr = width, depth, lr
        self._num_samples, self._seed = num_samples, seed

    @property
    def num_train_samples(self) -> int:
        """Samples per epoch."""
        return self._num_samples

    def prepare(self) -> None:
        """Make the data of both parts."""
        self._part(0, self._num_samples)
        self._part(1, NUM_HELD_OUT)

    def build_model(self) -> nn.Module:
        """A fresh fp32 `Mlp` on the default device."""
        return Mlp(width=self._width, depth=self._depth)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The hidden layers."""
        return list(cast(Mlp, model).layers)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum at the base learning rate."""
        return torch.optim.SGD(model.parameters(), lr=self._lr, momentum=MOMENTUM)

    def batch(self, indices: Sequence[int] | Indices, device: torch.device) -> tuple[Tensor, ...]:
        """Inputs (B, 16) and labels (B,) of the samples of those numbers, on `device`."""
        inputs, labels = self._part(0, self._num_samples)
        chosen = torch.tensor(indices, dtype=torch.int64, device="cpu")
        return inputs[chosen].to(device), labels[chosen].to(device)

    def num_elements(self, num_samples: int) -> int:
        """One loss element per sample."""
        return num_samples

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """Cross-entropy in nats, summed over the samples of the batch."""
        inputs, labels = batch
        loss_sum = F.cross_entropy(model(inputs).float(), labels, reduction="sum")
        return LossTerms(loss_sum=loss_sum, num_elements=len(labels))

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats per sample and the share of right answers over the held-out part."""
        inputs, labels = (tensor.to(device) for tensor in self._part(1, NUM_HELD_OUT))
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(inputs).float()
        model.train(was_training)
        num_right = (logits.argmax(dim=1) == labels).sum().item()
        return {"val_loss": F.cross_entropy(logits, labels).item(), "val_accuracy": num_right / len(labels)}

    def _part(self, part: int, num_samples: int) -> tuple[Tensor, Tensor]:
        return synthetic_classes(self._seed, part, num_samples)
