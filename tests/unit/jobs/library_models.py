"""Models and data of Lightning and Hugging Face as people write them; nothing in them knows of the orchestrator."""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import BinaryAccuracy

VOCABULARY = "0123456789+= "


class Points(lightning.LightningDataModule):  # type: ignore[misc]
    """256 points of two classes, in their order."""

    def __init__(self, num_points: int = 256) -> None:
        super().__init__()
        self.num_points = num_points

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        x = torch.randn(self.num_points, 8, generator=torch.Generator().manual_seed(1))
        y = (x.sum(1) > 0).long()
        self.train, self.held_out = TensorDataset(x, y), TensorDataset(x[:100], y[:100])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=16)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=32)


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """A perceptron with a schedule of one of the kinds that Lightning takes."""

    def __init__(self, lr: float = 0.05, width: int = 16, schedule: str = "onecycle", fused: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        self.accuracy = BinaryAccuracy()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self(x)
        self.accuracy(scores.argmax(1), y)
        self.log_dict({"val_loss": F.cross_entropy(scores, y), "accuracy": self.accuracy})
        self.log("largest", scores.max(), reduce_fx="max")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, fused=self.hparams.fused)
        steps = self.trainer.estimated_stepping_batches
        match self.hparams.schedule:
            case "none":
                return optimizer
            case "onecycle":
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=steps)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
            case "plateau":
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
                return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}
            case _:
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.3)]


class WithItsOwnData(Classifier):
    """Loaders in the module; it reads how far it is, and keeps something in checkpoints."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr, schedule="none")
        self.epochs_seen: list[int] = []

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]  # Lightning allows either
        self.epochs_seen.append(self.current_epoch)
        return {"loss": super().training_step(batch, 0) * (1 + 0.1 * self.global_step)}

    def train_dataloader(self) -> Any:
        data = Points()
        data.setup("fit")
        return data.train_dataloader()

    def val_dataloader(self) -> Any:
        data = Points()
        data.setup("fit")
        return data.val_dataloader()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epochs_seen"] = list(self.epochs_seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs_seen = checkpoint["epochs_seen"]


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class WithHooks(Classifier):
    def on_train_epoch_end(self) -> None:
        raise AssertionError("nobody calls it")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("nobody calls it")


class TwoOptimizers(Classifier):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]


class NoLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class AsksForMore(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1 / self.trainer.num_devices)


class Sums(Dataset[dict[str, Tensor]]):
    """Sums as text, the blanks behind them masked or not, with a column that no model takes."""

    def __init__(self, size: int, *, is_masked: bool) -> None:
        generator = torch.Generator().manual_seed(size)
        numbers = torch.randint(0, 50, (size, 2), generator=generator).tolist()
        texts = [f"{a}+{b}={a + b}".ljust(10) for a, b in numbers]
        self.ids = torch.tensor([[VOCABULARY.index(letter) for letter in text] for text in texts])
        self.is_masked = is_masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        labels = ids.masked_fill(ids == VOCABULARY.index(" "), -100) if self.is_masked else ids.clone()
        return {"input_ids": ids, "labels": labels, "comment": torch.zeros(1)}


def accuracy(found: Any) -> dict[str, float]:
    predicted, labels = found.predictions.argmax(-1)[:, :-1], found.label_ids[:, 1:]
    counted = labels != -100
    return {"accuracy": float((predicted == labels)[counted].mean())}


def sums(is_masked: bool = True, size: int = 192) -> dict[str, Any]:
    return {
        "train": DataLoader(Sums(size, is_masked=is_masked), collate_fn=transformers.default_data_collator),
        "eval": Sums(50, is_masked=is_masked),
        "compute_metrics": accuracy,
    }


KEPT_SUMS = Sums(64, is_masked=False), Sums(16, is_masked=False)
"""Data that is there already."""


def unlabelled() -> tuple[Any, Any]:
    data = [{"input_ids": torch.zeros(4, dtype=torch.long)} for _ in range(32)]
    return data, data


def nothing_to_evaluate() -> Any:
    return Sums(32, is_masked=False)


def wrong_parts() -> dict[str, int]:
    return {"trian": 1}


def gpt2(n_layer: int = 1) -> Any:
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=16, n_embd=16, n_layer=n_layer, n_head=2, bos_token_id=0, eos_token_id=12,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts() -> tuple[Any, Any]:
    """Rows with one label each."""
    texts = Sums(96, is_masked=False)
    rows = [texts[number]["input_ids"] for number in range(len(texts))]
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in rows]
    return data[:64], data[64:]


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)
