"""An autoencoder for digits-like patterns with Lightning: DataModule, checkpoints, an average of the weights."""

import copy

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class PatternData(L.LightningDataModule):
    def __init__(self, batch_size=32, seed=0):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage=None):
        g = torch.Generator().manual_seed(self.hparams.seed)
        basis = torch.randn(6, 64, generator=g)
        codes = torch.randn(1280, 6, generator=g)
        patterns = torch.tanh(codes @ basis) + 0.1 * torch.randn(1280, 64, generator=g)
        self.train_set, self.val_set = TensorDataset(patterns[:1024]), TensorDataset(patterns[1024:])

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=128)


class AutoEncoder(L.LightningModule):
    def __init__(self, lr=3e-3, hidden=48, code=6, scheduler="plateau"):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.GELU(), nn.Linear(hidden, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = F.mse_loss(self(x), x)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        self.log("val_loss", F.mse_loss(self(x), x), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        if self.hparams.scheduler == "onecycle":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class EMA(Callback):
    """Validate and finish with an exponential moving average of the weights."""

    def __init__(self, decay=0.95):
        self.decay = decay
        self.average = None
        self.trained = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.average is None:
            self.average = copy.deepcopy(module.state_dict())
        for name, value in module.state_dict().items():
            self.average[name].lerp_(value, 1 - self.decay)

    def on_validation_start(self, trainer, module):
        if self.average is not None:
            self.trained = copy.deepcopy(module.state_dict())
            module.load_state_dict(self.average)

    def on_validation_end(self, trainer, module):
        if self.trained is not None:
            module.load_state_dict(self.trained)
            self.trained = None

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]


def train(config):
    L.seed_everything(config["seed"])
    data = PatternData(config["batch_size"], config["seed"])
    model = AutoEncoder(config["lr"], config.get("hidden", 48), scheduler=config.get("scheduler", "plateau"))
    trainer = L.Trainer(
        max_epochs=config["max_epochs"],
        logger=CSVLogger("logs"),
        callbacks=[
            EMA(config.get("ema", 0.95)),
            ModelCheckpoint(monitor="val_loss", save_last=True),
            LearningRateMonitor(),
        ],
        gradient_clip_val=1.0,
        log_every_n_steps=8,
    )
    trainer.fit(model, data)
    print({name: value.item() for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    train({"lr": 5e-3, "batch_size": 32, "max_epochs": 6, "seed": 7})
