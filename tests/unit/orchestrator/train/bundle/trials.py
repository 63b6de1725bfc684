"""Trials of one kind as steppers, alone and as members of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.policies.plan import Settings
from orchestrator.train.bundle.bundle import Bundle, Recorder
from orchestrator.train.bundle.forward import forward_of
from orchestrator.train.bundle.member import Member
from orchestrator.train.groups import Ranks
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK, order, settings


class Attending(nn.Module):
    """Embedding, attention, norm, dropout and a head: the layers that most models are made of.

    Keys have no bias: its gradient is rounding alone, which Adam would blow up to whole steps.
    """

    def __init__(self, width: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(20, width), nn.LayerNorm(width)
        self.qkv, self.head = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 20)
        self.drop, self.attention_dropout = nn.Dropout(dropout), attention_dropout

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x = self.drop(self.tokens(tokens_bt))
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        rate = self.attention_dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        return self.head(functional.gelu(x + self.drop(mixed.transpose(1, 2).flatten(2))))  # type: ignore[no-any-return]


class Tokens:
    """Next-token prediction on random tokens, with every number of the optimizer a parameter."""

    metric = "val_loss"

    def __init__(
        self,
        *,
        lr: float = 0.01,
        decay: float = 0.1,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        clip: float | None = 1.0,
        clip_value: float | None = None,
        smoothing: float = 0.0,
        optimizer: str = "adamw",
        momentum: float = 0.9,
        beta2: float = 0.95,
        schedule: str = "",
    ) -> None:
        self.lr, self.decay, self.dropout, self.attention_dropout = lr, decay, dropout, attention_dropout
        self.clip_norm, self.clip_value, self.smoothing = clip, clip_value, smoothing
        self.optimizer, self.momentum, self.beta2, self.schedule = optimizer, momentum, beta2, schedule
        self.tokens = torch.randint(20, (96, 9), generator=torch.Generator().manual_seed(1))
        self.num_train_samples = len(self.tokens)

    def build_model(self) -> nn.Module:
        return Attending(16, self.dropout, self.attention_dropout)

    def batch(self, numbers: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        chosen = self.tokens[torch.as_tensor(numbers, dtype=torch.int64)]
        return chosen[:, :-1].to(device), chosen[:, 1:].to(device)

    def num_elements(self, num_samples: int) -> int:
        return num_samples * 8

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, targets = batch
        logits = model(inputs).flatten(0, 1)
        found = functional.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=self.smoothing)
        return found, targets.numel()

    def build_optimizer(self, model: nn.Module) -> object:
        matrices = [param for param in model.parameters() if param.ndim >= 2]
        others = [param for param in model.parameters() if param.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]
        if self.optimizer == "sgd":
            built: torch.optim.Optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        elif self.optimizer == "nesterov":
            built = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)
        else:
            kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
            built = kind(groups, lr=self.lr, betas=(0.9, self.beta2))
        if self.schedule == "cosine":
            return built, torch.optim.lr_scheduler.CosineAnnealingLR(built, 40)
        if self.schedule == "one cycle":
            return built, torch.optim.lr_scheduler.OneCycleLR(built, self.lr, total_steps=100)
        return built

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokens = self.tokens[:16]
        logits = model(tokens[:, :-1]).flatten(0, 1)
        return {"val_loss": float(functional.cross_entropy(logits, tokens[:, 1:].flatten()))}


def stepper(job: object, *, seed: int = 3, ranks: Ranks = ONE_RANK, **dials: object) -> Stepper:
    """A trial as its own process would make it; global generators are left as a lane's are."""
    first = order(Path("unused"))
    assert first.trial is not None
    start: Settings = settings(**dials)
    torch.manual_seed(seed)
    return Stepper(replace(first.trial, seed=seed, start=start), job, ranks)


def member(job: object, *, seed: int = 3, ranks: Ranks = ONE_RANK, **dials: object) -> Member:
    """The same as a member of a bundle, with the generator that it would have alone."""
    made = stepper(job, seed=seed, ranks=ranks, **dials)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return Member(made, generator)


def bundle(
    members: list[Member], *, num_rows: int | None = None, recorder: Recorder | None = None, is_compiled: bool = False
) -> Bundle:
    forward = forward_of(members[0], is_compiled=is_compiled)
    return Bundle(members, forward, num_rows=num_rows, recorder=recorder)


def alone(made: Stepper, num_steps: int) -> list[float]:
    """Losses of the next steps of a trial alone."""
    return [result.loss for _ in range(num_steps) for result in made.advance()]


def weights(made: Stepper) -> Tensor:
    return torch.cat([param.detach().flatten() for param in made.model.parameters()])
