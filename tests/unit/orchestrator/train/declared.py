"""Declared trainings as people write them, one class each, and a loop that trains the same in plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from orchestrator.control.orders import SlotOrder
from orchestrator.jobs.data import SampleCursor
from orchestrator.train.groups import Ranks
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK, order

NUM_SAMPLES, NUM_CLASSES = 96, 4


class Points(Dataset[dict[str, Tensor]]):
    """Points of two classes as dicts."""

    def __init__(self, num_inputs: int = 12) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(NUM_SAMPLES, num_inputs, generator=generator)
        self.y = (self.x[:, 0] > 0).long() + 2 * (self.x[:, 1] > 0).long()

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class TwoGroups:
    """Dict batches from a loader, a mean loss, two parameter groups and one that is empty, a cosine, no clipping."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, NUM_CLASSES))

    def train_data(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Points(), batch_size=32, shuffle=True)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return 30 * F.cross_entropy(model(batch["x"]), batch["y"])  # large, so that clipping to 1 would show

    def build_optimizer(self, model: nn.Module) -> Any:
        first, *rest = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 3e-3}, {"params": rest}, {"params": []}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return optimizer, CosineAnnealingLR(optimizer, T_max=30)

    def eval_data(self) -> Points:
        return Points()


class Unrandom(TwoGroups):
    """The same without dropout."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES))


class BatchNormNet(nn.Module):
    """Two convolutions with BatchNorm and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        x = x + F.relu(self.norms[1](self.second(x)))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Pictures(Dataset[tuple[Tensor, int]]):
    """Tuples of a picture and a label; with `augments` each is flipped and shifted at random."""

    def __init__(self, *, augments: bool = False) -> None:
        generator = torch.Generator().manual_seed(6)
        self.pictures = torch.randn(NUM_SAMPLES, 1, 6, 6, generator=generator)
        self.augments = augments

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.pictures[index]
        if self.augments:
            picture = picture.flip(2) if random.random() < 0.5 else picture
            picture = picture + 0.1 * torch.randn(()) + float(np.random.normal(0, 0.1))
        return picture, int(self.pictures[index].mean() * 20) % NUM_CLASSES


class BatchNormed:
    """BatchNorm, SGD with momentum, a scheduler by epochs."""

    scheduler_interval = "epoch"
    augments = False

    def build_model(self) -> nn.Module:
        return BatchNormNet()

    def train_data(self) -> Pictures:
        return Pictures(augments=self.augments)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(model(pictures), labels)

    def build_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return optimizer, CosineAnnealingLR(optimizer, T_max=5)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": float(model(Pictures().pictures).mean())}


class Augmented(BatchNormed):
    """The same with random samples, and random numbers in the model."""

    augments = True

    def __init__(self) -> None:
        self.num_seen = 0

    def build_model(self) -> nn.Module:
        return nn.Sequential(BatchNormNet(), nn.Dropout(0.2), nn.Linear(NUM_CLASSES, NUM_CLASSES))

    def after_step(self, model: nn.Module) -> None:
        self.num_seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_seen": self.num_seen, "kind": Augmented}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["kind"] is Augmented
        self.num_seen = state["num_seen"]


class TiedModel(nn.Module):
    """The embedding is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(x))))  # type: ignore[no-any-return]


def sentences() -> list[Tensor]:
    """Sentences of 3 to 9 words."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 10, (NUM_SAMPLES,), generator=generator).tolist()
    return [torch.randint(1, 20, (length,), generator=generator) for length in lengths]


def padded(samples: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(samples, batch_first=True)


class PaddedText:
    """Sentences padded to the longest of a batch: how many words count is known only with the batch."""

    clip_norm = 0.5

    def build_model(self) -> nn.Module:
        return TiedModel()

    def train_data(self) -> DataLoader[Tensor]:
        return DataLoader(sentences(), batch_size=8, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss_sum = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
        return loss_sum, (targets != 0).sum()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        loss_sum, count = self.loss(model, padded(sentences()[:16]).to(device))
        return {"val_loss": float(loss_sum / count)}


class LstmModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


class LstmLbfgs:
    """Waves predicted by an LSTM that LBFGS trains."""

    def build_model(self) -> nn.Module:
        return LstmModel()

    def train_data(self) -> Dataset[Any]:
        phases = torch.linspace(0, 6, NUM_SAMPLES)
        return torch.utils.data.TensorDataset(torch.sin(phases[:, None] + torch.arange(12.0) / 2)[..., None])

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        (waves,) = batch
        return F.mse_loss(model(waves[:, :-1]), waves[:, 1:])

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=5)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": 0.0}


class Gan:
    """Two networks and two optimizers, which its own step uses in turn."""

    def build_model(self) -> nn.Module:
        return nn.ModuleDict({"made": nn.Linear(4, 12), "judge": nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 1))})

    def train_data(self) -> Points:
        return Points()

    def build_optimizer(self, model: Any) -> Any:
        first, second = (torch.optim.Adam(model[name].parameters(), lr=1e-2) for name in ("made", "judge"))
        return [first, second], [StepLR(first, 4)]

    def train_step(
        self, model: Any, batch: dict[str, Tensor], maker: torch.optim.Optimizer, judge: torch.optim.Optimizer
    ) -> Tensor:
        real = batch["x"]
        made = model["made"](torch.randn(len(real), 4))
        judge.zero_grad()
        judged = F.softplus(model["judge"](made.detach())).mean() + F.softplus(-model["judge"](real)).mean()
        judged.backward()  # type: ignore[no-untyped-call]
        judge.step()
        maker.zero_grad()
        F.softplus(-model["judge"](made)).mean().backward()  # type: ignore[no-untyped-call]
        maker.step()
        return judged

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": 0.0}


class Plateau(TwoGroups):
    """A scheduler that follows the metric, clipping by value, and an average of the weights."""

    clip_value = 0.01
    metric = "val_loss"

    def __init__(self) -> None:
        self.average: AveragedModel | None = None

    def build_optimizer(self, model: nn.Module) -> Any:
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
        return optimizer, ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)

    def after_step(self, model: nn.Module) -> None:
        if self.average is None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
        self.average.update_parameters(model)


class Counted(IterableDataset[Tensor]):
    """Samples that say their own number, in epochs of 20."""

    def __init__(self) -> None:
        self.num_opened = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.num_opened += 1
        yield from torch.arange(20.0)[:, None]


class Streamed:
    """A stream whose length nobody says; keeps the samples it was shown."""

    def __init__(self) -> None:
        self.shown: list[float] = []

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_data(self) -> Counted:
        return Counted()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.shown += batch[:, 0].tolist()
        return model(batch / 20).square().mean()  # type: ignore[no-any-return]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"val_loss": 0.0}


class Sampled(Streamed):
    """A data set with a sampler of its own, which draws with replacement."""

    def train_data(self) -> DataLoader[Tensor]:  # type: ignore[override]
        numbers = [torch.tensor([float(n)]) for n in range(20)]
        sampler = WeightedRandomSampler([1.0] * 10 + [5.0] * 10, num_samples=30)
        return DataLoader(numbers, batch_size=4, sampler=sampler)  # type: ignore[arg-type]


def declared_order(directory: Path, training: object, *, micro_batch: int = 8, grad_accum: int = 1) -> SlotOrder:
    """An order whose start has those micro-batches; reports every 160 samples."""
    first = order(directory)
    assert first.trial is not None
    assert first.grant is not None
    start = replace(first.trial.start, micro_batch=micro_batch, grad_accum=grad_accum)
    job = f"{type(training).__module__}:{type(training).__qualname__}"
    trial = replace(first.trial, job=job, params={}, start=start)
    return replace(first, trial=trial, grant=replace(first.grant, settings=replace(start, share=0.5)))


def stepper(
    directory: Path, training: object, *, micro_batch: int = 8, grad_accum: int = 1, ranks: Ranks = ONE_RANK
) -> Stepper:
    """A stepper of it whose model was drawn from the trial's seed."""
    trial = declared_order(directory, training, micro_batch=micro_batch, grad_accum=grad_accum).trial
    assert trial is not None
    torch.manual_seed(trial.seed)
    return Stepper(replace(trial, start=replace(trial.start, num_workers=ranks.world_size)), training, ranks)


def norms(training: object, ranks: Ranks, num_steps: int = 30) -> list[float]:
    """Norms of the whole gradient of each step of 8 samples, cut over the ranks."""
    one = stepper(Path(), training, micro_batch=4 // ranks.world_size, grad_accum=2, ranks=ranks)
    return [one.step().grad_norm for _ in range(num_steps)]


def plainly(
    training: Any, num_steps: int, *, batch: int = 8, per_epoch: bool = False, closure: bool = False
) -> tuple[list[float], nn.Module]:
    """Losses of plain PyTorch on the same samples in the same order, and the model."""
    torch.manual_seed(3)
    model = training.build_model()
    built = training.build_optimizer(model)
    optimizer, scheduler = built if isinstance(built, tuple) else (built, None)
    data = training.train_data()
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    collate: Callable[[Any], Any] = (
        data.collate_fn if isinstance(data, DataLoader) else torch.utils.data.default_collate
    )
    torch.manual_seed(3)
    cursor, losses = SampleCursor(seed=3, num_samples=len(dataset)), []
    for _ in range(num_steps):
        indices, after = cursor.take(batch)
        samples = collate([dataset[index] for index in indices.tolist()])

        def evaluate(samples: Any = samples) -> Tensor:
            optimizer.zero_grad()
            found = training.loss(model, samples)
            loss = found[0] / found[1] if isinstance(found, tuple) else found
            loss.backward()
            if getattr(training, "clip_norm", None):
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            return loss  # type: ignore[no-any-return]

        loss = optimizer.step(evaluate) if closure else evaluate()
        if not closure:
            optimizer.step()
        losses.append(float(loss.detach()))
        if scheduler is not None and (not per_epoch or after.epoch > cursor.epoch):
            scheduler.step()
        cursor = after
    return losses, model
