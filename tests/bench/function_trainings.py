"""Training functions for `bench_functions`, as people have them: a Hugging Face model and a ResNet."""

from __future__ import annotations

import time
from typing import Any

import torch
from ray import tune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import orchestrator
from tests.foreign.resnet_batchnorm import ResNet


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpt2(config: dict[str, Any]) -> None:
    """A GPT-2 of the transformers library on random tokens with a rule: each is the sum of the two before it."""
    _train(config, *_gpt2(config))


def timed_gpt2(config: dict[str, Any]) -> None:
    """The same; seconds of its steps behind the third are appended to `config['marks']`."""
    loader, optimizer, loss_of = _gpt2(config)
    batches = iter(loader)
    for step in range(3 + config["steps"]):
        if step == 3:
            _wait()
            began_s = time.perf_counter()
        loss = loss_of([each.to(device(), non_blocking=True) for each in next(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait()
    config["marks"].append(time.perf_counter() - began_s)
    if orchestrator.trial() is not None:
        tune.report({"loss": loss.item()})


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _gpt2(config: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config.get("seed", 0))
    vocabulary, context = 64, config.get("context", 128)
    rows = torch.randint(0, vocabulary, (config.get("samples", 8192), 2))
    for _ in range(context - 2):
        rows = torch.cat([rows, (rows[:, -1:] + rows[:, -2:-1]) % vocabulary], 1)
    loader = DataLoader(TensorDataset(rows), batch_size=config.get("batch_size", 16), shuffle=True, drop_last=True)
    width, layers = config.get("width", 384), config.get("layers", 6)
    shape = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=6, bos_token_id=0,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(shape).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    return loader, optimizer, lambda batch: model(input_ids=batch[0], labels=batch[0]).loss


def linear_stack(config: dict[str, Any]) -> None:
    """Linear layers with a residual each, which learn a drawn one of their kind; with the line `orchestrator.watch`."""
    torch.manual_seed(config.get("seed", 0))
    width, depth, count = config.get("width", 1024), config.get("depth", 8), config.get("samples", 16384)

    def stack() -> nn.Module:
        return nn.Sequential(*(_Residual(width) for _ in range(depth)))

    features = torch.randn(count, width)
    with torch.no_grad():
        teacher = stack().to(device())
        targets = torch.cat([teacher(part.to(device())).cpu() for part in torch.split(features, 1024)])
        targets += 0.3 * torch.randn_like(targets)
    loader = DataLoader(
        TensorDataset(features, targets), batch_size=config.get("batch_size", 256), shuffle=True, drop_last=True
    )
    model = stack().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    orchestrator.watch(model, optimizer)
    _train(config, loader, optimizer, lambda batch: (model(batch[0]) - batch[1]).square().mean())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.second(torch.relu(self.first(self.norm(x))))
        return x + changed


def resnet(config: dict[str, Any]) -> None:
    """A ResNet with BatchNorm on drawn pictures of 32 x 32 pixels."""
    torch.manual_seed(config.get("seed", 0))
    count = config.get("samples", 8192)
    labels = torch.randint(0, 10, (count,))
    pictures = torch.randn(count, 1, 32, 32) + torch.linspace(-1, 1, 10)[labels][:, None, None, None]
    loader = DataLoader(
        TensorDataset(pictures, labels), batch_size=config.get("batch_size", 64), shuffle=True, drop_last=True
    )
    model: nn.Module = ResNet(config.get("width", 32))  # type: ignore[no-untyped-call]
    model.to(device())
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    _train(config, loader, optimizer, lambda batch: loss_of(model(batch[0]), batch[1]))


def _train(config: dict[str, Any], loader: Any, optimizer: torch.optim.Optimizer, loss_of: Any) -> None:
    """Steps until `reports` reports of `steps` each were made; losses are kept in `config['losses']` where that is."""
    step, total = 0, config["steps"] * config["reports"]
    kept: list[torch.Tensor] = []
    while step < total:
        for batch in loader:
            loss = loss_of([each.to(device(), non_blocking=True) for each in batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append(loss.detach())
            step += 1
            if step % config["steps"] == 0:
                tune.report({"loss": torch.stack(kept[-config["steps"] :]).mean().item()})
            if step == total:
                break
    if "losses" in config:
        config["losses"] += torch.stack(kept).tolist()
