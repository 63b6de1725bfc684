"""Recognise the shape of a noisy signal: a plain loop with warm-up, cosine and clipped gradients."""

import argparse
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

try:
    from ray import tune
except ImportError:  # only needed for searches
    tune = None


def make_signals(n, length=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (n,), generator=g)
    t = torch.linspace(0, 1, length)
    phase = torch.rand(n, 1, generator=g) + (1 + 5 * torch.rand(n, 1, generator=g)) * t
    sine = torch.sin(2 * math.pi * phase)
    square = torch.sign(sine)
    saw = 2 * (phase % 1) - 1
    signals = torch.stack([sine, square, saw])[kind, torch.arange(n)]
    return TensorDataset((signals + 0.7 * torch.randn(n, length, generator=g)).unsqueeze(1), kind)


class Classifier(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv1d(1, width, 7, padding=3),
            nn.GroupNorm(4, width),
            nn.GELU(),
            nn.MaxPool1d(4),
            nn.Conv1d(width, 2 * width, 5, padding=2),
            nn.GroupNorm(4, 2 * width),
            nn.GELU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(8 * width, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def param_groups(model, lr, head_lr, weight_decay):
    matrices = [p for p in model.backbone.parameters() if p.ndim > 1]
    vectors = [p for p in model.backbone.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": model.head.parameters(), "lr": head_lr, "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate(model, loader, device):
    model.eval()
    loss = hits = count = 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        logits = model(x)
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        hits += (logits.argmax(-1) == y).sum().item()
        count += len(y)
    return loss / count, hits / count


def main(config):
    torch.manual_seed(config["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader = DataLoader(
        make_signals(1536, seed=config["seed"]), batch_size=config["batch_size"], shuffle=True, drop_last=True
    )
    val_loader = DataLoader(make_signals(512, seed=config["seed"] + 1), batch_size=256)
    model = Classifier(config["width"], config["dropout"]).to(device)
    optimizer = torch.optim.AdamW(
        param_groups(model, config["lr"], config["head_lr"], config["weight_decay"]), betas=(0.9, 0.95)
    )
    total = config["epochs"] * len(train_loader)
    warmup = max(1, int(0.1 * total))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))),
    )

    best = 0.0
    for epoch in range(config["epochs"]):
        model.train()
        running = 0.0
        for x, y in train_loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.05)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
            optimizer.step()
            scheduler.step()
            running += loss.item()
        val_loss, accuracy = evaluate(model, val_loader, device)
        best = max(best, accuracy)
        metrics = {
            "train_loss": running / len(train_loader),
            "val_loss": val_loss,
            "accuracy": accuracy,
            "best_accuracy": best,
            "lr": scheduler.get_last_lr()[0],
        }
        print(f"epoch {epoch + 1}/{config['epochs']} " + " ".join(f"{k}={v:.4g}" for k, v in metrics.items()))
        if tune is not None and tune.get_context().get_trial_id() is not None:
            tune.report(metrics)
    return {"best_accuracy": best}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--head-lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return vars(parser.parse_args())


if __name__ == "__main__":
    print(main(parse_args()))
