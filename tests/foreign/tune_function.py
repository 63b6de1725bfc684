"""Search the learning rate and the sizes of a small CNN with Ray Tune.

python tune_function.py                   one training, to see whether it works
python tune_function.py --num-samples 20  the search
"""

import argparse
import os
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from ray import tune
from ray.tune import Checkpoint
from ray.tune.schedulers import ASHAScheduler


class Stripes(torch.utils.data.Dataset):
    """12x12 pictures of noisy stripes in one of four directions."""

    def __init__(self, size, seed):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(4, (size,), generator=g)
        angle = self.labels * (torch.pi / 4)
        phase = torch.rand(size, generator=g) * 6.28
        row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
        wave = row * torch.sin(angle)[:, None, None] + column * torch.cos(angle)[:, None, None]
        pictures = torch.sin(wave + phase[:, None, None])
        self.pictures = (pictures + 1.2 * torch.randn(pictures.shape, generator=g)).unsqueeze(1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pictures[i], self.labels[i]


class Net(nn.Module):
    def __init__(self, l1=32, l2=16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(6 * 5 * 5, l1)
        self.fc2 = nn.Linear(l1, l2)
        self.fc3 = nn.Linear(l2, 4)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train_stripes(config):
    torch.manual_seed(config.get("seed", 0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = Net(config["l1"], config["l2"]).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=config["lr"], momentum=0.9)

    start_epoch = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as checkpoint_dir:
            state = torch.load(os.path.join(checkpoint_dir, "data.pt"))
        start_epoch = state["epoch"]
        net.load_state_dict(state["net_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])

    trainloader = torch.utils.data.DataLoader(Stripes(1024, seed=1), batch_size=config["batch_size"], shuffle=True)
    valloader = torch.utils.data.DataLoader(Stripes(512, seed=2), batch_size=128)

    for epoch in range(start_epoch, config.get("max_epochs", 6)):
        torch.manual_seed(1000 * config.get("seed", 0) + epoch)
        for inputs, labels in trainloader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()

        val_loss, correct, total = 0.0, 0, 0
        with torch.no_grad():
            for inputs, labels in valloader:
                inputs, labels = inputs.to(device), labels.to(device)
                outputs = net(inputs)
                val_loss += criterion(outputs, labels).item() * labels.size(0)
                correct += (outputs.argmax(1) == labels).sum().item()
                total += labels.size(0)

        print(f"epoch {epoch}: loss {val_loss / total:.4f}, accuracy {correct / total:.4f}")
        with tempfile.TemporaryDirectory() as checkpoint_dir:
            state = {
                "epoch": epoch + 1,
                "net_state_dict": net.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
            }
            torch.save(state, os.path.join(checkpoint_dir, "data.pt"))
            tune.report(
                {"loss": val_loss / total, "accuracy": correct / total},
                checkpoint=Checkpoint.from_directory(checkpoint_dir),
            )


def search(num_samples):
    space = {
        "l1": tune.choice([2**i for i in range(3, 7)]),
        "l2": tune.choice([2**i for i in range(3, 7)]),
        "lr": tune.loguniform(1e-3, 1e-1),
        "batch_size": tune.choice([16, 32, 64]),
    }
    tuner = tune.Tuner(
        tune.with_resources(train_stripes, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", num_samples=num_samples, scheduler=ASHAScheduler(max_t=6, grace_period=1)
        ),
    )
    best = tuner.fit().get_best_result()
    print("best config:", best.config, "loss:", best.metrics["loss"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-samples", type=int, default=0)
    args = parser.parse_args()
    if args.num_samples:
        search(args.num_samples)
    else:
        train_stripes({"l1": 32, "l2": 16, "lr": 0.02, "batch_size": 32})
