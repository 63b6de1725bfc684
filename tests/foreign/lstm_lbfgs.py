"""Predict sine waves with an LSTM, trained by LBFGS on all of them at once, or by RMSprop."""

import argparse

import torch
from ray.tune import report
from torch import nn


def waves(n, length, seed):
    g = torch.Generator().manual_seed(seed)
    shift = torch.randint(-40, 40, (n, 1), generator=g)
    return torch.sin((torch.arange(length) + shift) / 6.0)


class Sequence(nn.Module):
    def __init__(self, hidden, norm=False):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.linear = nn.Linear(hidden, 1)

    def forward(self, x, future=0):
        out, state = self.lstm(x.unsqueeze(-1))
        out = self.linear(self.norm(out))
        outputs = [out]
        for _ in range(future):
            step, state = self.lstm(out[:, -1:], state)
            out = self.linear(self.norm(step))
            outputs.append(out)
        return torch.cat(outputs, dim=1).squeeze(-1)


def make_optimizer(name, model, lr):
    if name == "lbfgs":
        return torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=10, line_search_fn="strong_wolfe")
    # without a norm the second group is empty
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.startswith("norm")]},
        {"params": list(model.norm.parameters()), "lr": 10 * lr},
    ]
    return torch.optim.RMSprop(groups, lr=lr, alpha=0.95)


def train(optimizer="lbfgs", lr=0.5, hidden=16, steps=12, report_every=2, norm=False, seed=0):
    torch.manual_seed(seed)
    train_data, test_data = waves(24, 60, seed=seed), waves(8, 60, seed=seed + 1)
    model = Sequence(hidden, norm)
    criterion = nn.MSELoss()
    opt = make_optimizer(optimizer, model, lr)

    for i in range(1, steps + 1):

        def closure():
            opt.zero_grad()
            loss = criterion(model(train_data[:, :-1]), train_data[:, 1:])
            loss.backward()
            return loss

        loss = opt.step(closure)

        if i % report_every == 0:
            with torch.no_grad():
                pred = model(test_data[:, :40], future=19)
                test_loss = criterion(pred, test_data[:, 1:]).item()
            print(f"STEP {i}: loss {loss.item():.6f}, test loss {test_loss:.6f}")
            report({"step": i, "loss": loss.item(), "test_loss": test_loss})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["lbfgs", "rmsprop"], default="lbfgs")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    train(args.optimizer, args.lr, steps=args.steps)
