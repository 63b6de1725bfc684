"""Tabular binary classification: an MLP over numbers and categories, with everything in one config."""

import copy

import torch
from ray.tune import report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

DEFAULT_CONFIG = {
    "num_rows": 1600,
    "val_fraction": 0.25,
    "normalize": True,
    "clip_outliers": 4.0,
    "use_categories": True,
    "embedding_dims": [4, 3],
    "hidden": [48, 24],
    "activation": "relu",
    "residual": False,
    "norm": "layer",
    "dropout": [0.1, 0.0],
    "input_noise": 0.0,
    "init_gain": None,
    "batch_size": 32,
    "drop_last": True,
    "oversample": True,
    "pos_weight": None,
    "label_smoothing": 0.02,
    "optimizer": {"name": "adamw", "lr": 4e-3, "weight_decay": 0.01, "betas": [0.9, 0.99]},
    "schedule": {"name": "step", "every": 3, "gamma": 0.5},
    "clip": {"kind": "norm", "value": 2.0},
    "max_epochs": 6,
    "early_stopping": {"patience": 4, "min_delta": 1e-4},
    "seed": 11,
}


def make_table(num_rows, seed):
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(num_rows, 10, generator=g) * torch.logspace(-1, 1, 10)
    city = torch.randint(12, (num_rows,), generator=g)
    plan = torch.randint(5, (num_rows,), generator=g)
    scaled = numbers / torch.logspace(-1, 1, 10)
    effect = torch.randn(12, generator=g)[city] + torch.randn(5, generator=g)[plan]
    score = scaled[:, 0] * scaled[:, 1] + scaled[:, 2].abs() - scaled[:, 3] + effect - 1.5
    target = torch.bernoulli(torch.sigmoid(2 * score), generator=g)
    return numbers, torch.stack([city, plan], dim=1), target


def auc(scores, targets):
    """Chance that a positive row scores higher than a negative one."""
    positive, negative = scores[targets == 1], scores[targets == 0]
    difference = positive[:, None] - negative[None, :]
    return ((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean()).item()


class Block(nn.Module):
    def __init__(self, d_in, d_out, config, dropout):
        super().__init__()
        norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": lambda _: nn.Identity()}
        activations = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
        self.linear = nn.Linear(d_in, d_out)
        self.rest = nn.Sequential(
            norms[config["norm"]](d_out), activations[config["activation"]](), nn.Dropout(dropout)
        )
        self.residual = config["residual"] and d_in == d_out
        if config["init_gain"] is not None:
            nn.init.xavier_uniform_(self.linear.weight, gain=config["init_gain"])

    def forward(self, x):
        out = self.rest(self.linear(x))
        return x + out if self.residual else out


class TabularNet(nn.Module):
    def __init__(self, config, num_numbers=10, cardinalities=(12, 5)):
        super().__init__()
        self.noise = config["input_noise"]
        self.embeddings = nn.ModuleList()
        if config["use_categories"]:
            self.embeddings.extend(nn.Embedding(n, d) for n, d in zip(cardinalities, config["embedding_dims"]))
        width, blocks = num_numbers + sum(e.embedding_dim for e in self.embeddings), []
        for hidden, dropout in zip(config["hidden"], config["dropout"]):
            blocks.append(Block(width, hidden, config, dropout))
            width = hidden
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(width, 1)

    def forward(self, numbers, categories):
        if self.training and self.noise:
            numbers = numbers + self.noise * torch.randn_like(numbers)
        parts = [numbers] + [e(categories[:, i]) for i, e in enumerate(self.embeddings)]
        return self.out(self.blocks(torch.cat(parts, dim=1))).squeeze(1)


def build_optimizer(model, spec):
    if spec["name"] == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=spec["lr"], momentum=spec["momentum"], nesterov=spec.get("nesterov", False)
        )
    return torch.optim.AdamW(
        model.parameters(), lr=spec["lr"], weight_decay=spec["weight_decay"], betas=tuple(spec["betas"])
    )


def build_schedule(optimizer, spec, max_epochs):
    if spec is None:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if spec["name"] == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_epochs)
    return torch.optim.lr_scheduler.StepLR(optimizer, spec["every"], spec["gamma"])


def clip_gradients(model, clip):
    if clip is None:
        return
    if clip["kind"] == "value":
        nn.utils.clip_grad_value_(model.parameters(), clip["value"])
    else:
        nn.utils.clip_grad_norm_(model.parameters(), clip["value"])


def load(config):
    numbers, categories, target = make_table(config["num_rows"], config["seed"])
    split = int(len(target) * (1 - config["val_fraction"]))
    if config["normalize"]:
        numbers = (numbers - numbers[:split].mean(0)) / numbers[:split].std(0)
    if config["clip_outliers"]:
        numbers = numbers.clamp(-config["clip_outliers"], config["clip_outliers"])
    train = TensorDataset(numbers[:split], categories[:split], target[:split])
    sampler = None
    if config["oversample"]:
        share = target[:split].mean()
        weights = torch.where(target[:split] == 1, 0.5 / share, 0.5 / (1 - share))
        sampler = WeightedRandomSampler(weights.tolist(), split)
    loader = DataLoader(
        train, config["batch_size"], sampler=sampler, shuffle=sampler is None, drop_last=config["drop_last"]
    )
    return loader, (numbers[split:], categories[split:], target[split:])


def train(config):
    config = {**copy.deepcopy(DEFAULT_CONFIG), **config}
    unknown = set(config) - set(DEFAULT_CONFIG)
    if unknown:
        raise ValueError(f"unknown parameters {sorted(unknown)}")
    torch.manual_seed(config["seed"])
    loader, (val_numbers, val_categories, val_target) = load(config)
    model = TabularNet(config)
    optimizer = build_optimizer(model, config["optimizer"])
    schedule = build_schedule(optimizer, config["schedule"], config["max_epochs"])
    pos_weight = None if config["pos_weight"] is None else torch.tensor(config["pos_weight"])
    criterion = nn.BCEWithLogitsLoss(pos_weight=pos_weight)
    smoothing, best, bad_epochs = config["label_smoothing"], 0.0, 0
    for epoch in range(config["max_epochs"]):
        model.train()
        losses = []
        for numbers, categories, target in loader:
            loss = criterion(model(numbers, categories), target * (1 - smoothing) + smoothing / 2)
            optimizer.zero_grad()
            loss.backward()
            clip_gradients(model, config["clip"])
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        model.eval()
        with torch.no_grad():
            logits = model(val_numbers, val_categories)
        metrics = {
            "train/loss": sum(losses) / len(losses),
            "val/loss": criterion(logits, val_target).item(),
            "val/auc": auc(logits, val_target),
        }
        print(f"epoch {epoch}", metrics)
        report({"epoch": epoch, **metrics})
        stopping = config["early_stopping"]
        bad_epochs = 0 if metrics["val/auc"] > best + (stopping or {}).get("min_delta", 0) else bad_epochs + 1
        best = max(best, metrics["val/auc"])
        if stopping and bad_epochs >= stopping["patience"]:
            break


if __name__ == "__main__":
    train({})
