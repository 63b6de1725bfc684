"""Classify synthetic customers with Ray Train."""

import os
import tempfile

import torch
from ray import train
from ray.train import Checkpoint, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_data(num_samples, num_features, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, num_features, generator=generator)
    first = torch.randn(num_features, 16, generator=generator)
    second = torch.randn(16, 4, generator=generator)
    labels = (torch.tanh(features @ first) @ second).argmax(dim=1)
    return TensorDataset(features, labels)


class Net(nn.Module):
    def __init__(self, num_features, hidden, dropout):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 4),
        )

    def forward(self, x):
        return self.layers(x)


def evaluate(model, loader, loss_fn):
    model.eval()
    loss, correct, total = 0.0, 0, 0
    with torch.no_grad():
        for x, y in loader:
            logits = model(x)
            loss += loss_fn(logits, y).item() * len(y)
            correct += (logits.argmax(dim=1) == y).sum().item()
            total += len(y)
    return {"loss": loss / total, "accuracy": correct / total}


def train_loop_per_worker(config):
    torch.manual_seed(config["seed"])
    data = make_data(2560, 20, seed=config["seed"])
    train_data, val_data = torch.utils.data.random_split(data, [2048, 512])
    train_loader = DataLoader(train_data, batch_size=config["batch_size"], shuffle=True)
    val_loader = DataLoader(val_data, batch_size=256)
    train_loader = prepare_data_loader(train_loader)
    val_loader = prepare_data_loader(val_loader)

    model = prepare_model(Net(20, config.get("hidden", 64), config.get("dropout", 0.1)))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])

    start_epoch = 0
    checkpoint = train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as checkpoint_dir:
            state = torch.load(os.path.join(checkpoint_dir, "checkpoint.pt"))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start_epoch = state["epoch"] + 1

    world_size = train.get_context().get_world_size()
    for epoch in range(start_epoch, config["epochs"]):
        torch.manual_seed(config["seed"] + epoch)
        if world_size > 1:
            train_loader.sampler.set_epoch(epoch)
        model.train()
        for x, y in train_loader:
            loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        metrics = {"epoch": epoch, **evaluate(model, val_loader, loss_fn)}
        with tempfile.TemporaryDirectory() as tmp:
            checkpoint = None
            if train.get_context().get_world_rank() == 0:
                state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, os.path.join(tmp, "checkpoint.pt"))
                checkpoint = Checkpoint.from_directory(tmp)
            train.report(metrics, checkpoint=checkpoint)
            print(metrics)


if __name__ == "__main__":
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"lr": 3e-3, "batch_size": 64, "epochs": 8, "seed": 0},
        # 0 workers: in this process, without a cluster
        scaling_config=ScalingConfig(num_workers=0),
    )
    print("final:", trainer.fit().metrics)
