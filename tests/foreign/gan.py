"""A GAN that learns points on a ring of eight Gaussians."""

import math

import torch
from ray import tune
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset


def ring(n, modes=8, radius=2.0, std=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    angle = torch.randint(modes, (n,), generator=g) * (2 * math.pi / modes)
    centers = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centers + std * torch.randn(n, 2, generator=g)


class Generator(nn.Module):
    def __init__(self, nz, hidden):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(nz, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True), nn.Linear(hidden, 2)
        )

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(2, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1)
        )

    def forward(self, x):
        return self.main(x).view(-1)


@torch.no_grad()
def distance(a, b):
    """Energy distance of two samples: 0 for the same distribution."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def train_gan(config):
    torch.manual_seed(config["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nz = config["nz"]
    loader = DataLoader(
        TensorDataset(ring(2048, seed=config["seed"])), batch_size=config["batch_size"], shuffle=True, drop_last=True
    )
    held_out = ring(512, seed=config["seed"] + 1).to(device)
    fixed_noise = torch.randn(512, nz, device=device)
    netG, netD = Generator(nz, config["hidden"]).to(device), Discriminator(config["hidden"]).to(device)
    criterion = nn.BCEWithLogitsLoss()
    optimizerD = optim.Adam(netD.parameters(), lr=config["lr_d"], betas=(0.5, 0.999))
    optimizerG = optim.Adam(netG.parameters(), lr=config["lr_g"], betas=(0.5, 0.999))

    for epoch in range(config["num_epochs"]):
        for (real,) in loader:
            # (1) Update D: maximize log(D(x)) + log(1 - D(G(z)))
            netD.zero_grad()
            real = real.to(device)
            b_size = real.size(0)
            errD_real = criterion(netD(real), torch.ones(b_size, device=device))
            errD_real.backward()
            fake = netG(torch.randn(b_size, nz, device=device))
            errD_fake = criterion(netD(fake.detach()), torch.zeros(b_size, device=device))
            errD_fake.backward()
            errD = errD_real + errD_fake
            optimizerD.step()

            # (2) Update G: maximize log(D(G(z)))
            netG.zero_grad()
            errG = criterion(netD(fake), torch.ones(b_size, device=device))
            errG.backward()
            optimizerG.step()

        d = distance(netG(fixed_noise), held_out)
        print(f"[{epoch + 1}] Loss_D: {errD.item():.4f} Loss_G: {errG.item():.4f} distance: {d:.4f}")
        tune.report({"loss_d": errD.item(), "loss_g": errG.item(), "distance": d})


if __name__ == "__main__":
    train_gan({"lr_d": 2e-3, "lr_g": 1e-3, "nz": 8, "hidden": 64, "batch_size": 128, "num_epochs": 10, "seed": 0})
