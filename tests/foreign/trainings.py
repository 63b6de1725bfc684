"""The table of the trainings in this folder: entry point, metric, parameters of a short run, and what it allows.

The trainings themselves know nothing of it, and it imports none of them, so it can be read where their libraries are
missing. Read by the tests of this folder and of the driver that runs functions.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

Reports = Literal["ray.train", "ray.tune", "huggingface", "lightning"]
"""Whose reports it makes: calls of Ray's `report`, or evaluations that the library makes by itself."""

Resume = Literal["reported", "library", "anew"]
"""What a second attempt goes on from: checkpoints passed to `report`, those the library wrote by itself, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignTraining:
    """One training and what may be expected of it.

    `params` is a short run of a few seconds on one core, with the values of the file's own `__main__` where it has
    any. `takes` says whether the entry point gets them as one dict or as keywords. `num_reports` and `num_steps` (of
    the first optimizer) are those of that run with all dials still.
    """

    name: str
    entry: str
    takes: Literal["config", "keywords"]
    metric: str
    mode: Literal["min", "max"]
    reports: Reports = "ray.tune"
    params: Mapping[str, Any]
    num_steps: int
    num_reports: int
    off: Mapping[str, str] = field(default_factory=dict)
    """Dials that it does not allow, and why, in the words of a run with it. Nothing of the orchestrator is imported
    here, because the plain twin must not have it in its process."""
    resume: Resume = "anew"
    reports_alone: bool = True
    """Whether it calls `report` outside a session of Ray's too, where that does nothing."""
    needs: tuple[str, ...] = ()
    """Importable libraries besides torch, numpy and Ray."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Other values worth a run, by name."""

    @property
    def path(self) -> Path:
        """The file, as it is run by itself."""
        return FOLDER / f"{self.name}.py"

    @property
    def import_path(self) -> str:
        """The entry point as a run file names it."""
        return f"tests.foreign.{self.name}:{self.entry}"

    def function(self) -> Callable[..., Any]:
        """The entry point itself; imports the training."""
        function: Callable[..., Any] = getattr(importlib.import_module(f"tests.foreign.{self.name}"), self.entry)
        return function

    def call(self, params: Mapping[str, Any]) -> Any:
        """Run the entry point in this process, the way its author would."""
        if self.reports == "ray.train":
            return in_ray_train(self.function(), dict(params))
        function = self.function()
        return function(dict(params)) if self.takes == "config" else function(**params)

    def signature(self) -> list[str]:
        """Names of the entry point's parameters, read from the file without importing it."""
        tree = ast.parse(self.path.read_text(encoding="ascii"))
        found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == self.entry)
        return [argument.arg for argument in found.args.args]


def in_ray_train(loop: Callable[..., Any], config: dict[str, Any]) -> Any:
    """Call a Ray Train loop in this process: with no workers Ray does so, and starts no cluster.

    Called directly, its `ray.train.report` would raise.
    """
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(loop, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0)).fit().metrics


NO_LOADER = "no DataLoader"
SCHEDULE = "its learning rate changes with every step, so that it counts steps"
COUNTS_STEPS = "the Trainer counts its steps beforehand"
LINE_SEARCH = "LBFGS compares losses within a step, which bf16 rounds alike"

TRAININGS: tuple[ForeignTraining, ...] = (
    ForeignTraining(
        name="ray_train_loop",
        entry="train_loop_per_worker",
        takes="config",
        metric="accuracy",
        mode="max",
        reports="ray.train",
        params={"lr": 3e-3, "batch_size": 64, "epochs": 8, "seed": 0},
        num_steps=256,
        num_reports=8,
        resume="reported",
    ),
    ForeignTraining(
        name="tune_function",
        entry="train_stripes",
        takes="config",
        metric="loss",
        mode="min",
        params={"l1": 32, "l2": 16, "lr": 0.02, "batch_size": 32},
        num_steps=192,
        num_reports=6,
        resume="reported",
    ),
    ForeignTraining(
        name="plain_loop",
        entry="main",
        takes="config",
        metric="best_accuracy",
        mode="max",
        params={
            "lr": 2e-3,
            "head_lr": 5e-3,
            "weight_decay": 0.05,
            "batch_size": 48,
            "width": 16,
            "dropout": 0.1,
            "clip": 1.0,
            "epochs": 6,
            "seed": 0,
        },
        num_steps=192,
        num_reports=6,
        off={"batch": SCHEDULE},
        reports_alone=False,
    ),
    ForeignTraining(
        name="nanogpt_style",
        entry="train",
        takes="keywords",
        metric="val_loss",
        mode="min",
        params={},
        num_steps=150,
        num_reports=7,
        off={"batch": NO_LOADER},
        variants={"short": {"max_iters": 40, "lr_decay_iters": 40, "eval_interval": 10}},
    ),
    ForeignTraining(
        name="resnet_batchnorm",
        entry="train",
        takes="config",
        metric="accuracy",
        mode="max",
        params={"lr": 0.1, "batch_size": 60, "epochs": 5, "width": 8, "seed": 0},
        num_steps=120,
        num_reports=5,
        needs=("sklearn",),
    ),
    ForeignTraining(
        name="gan",
        entry="train_gan",
        takes="config",
        metric="distance",
        mode="min",
        params={"lr_d": 2e-3, "lr_g": 1e-3, "nz": 8, "hidden": 64, "batch_size": 128, "num_epochs": 10, "seed": 0},
        num_steps=160,
        num_reports=10,
    ),
    ForeignTraining(
        name="lstm_lbfgs",
        entry="train",
        takes="keywords",
        metric="test_loss",
        mode="min",
        params={"optimizer": "lbfgs", "lr": 0.5, "steps": 12},
        num_steps=12,
        num_reports=6,
        off={"batch": NO_LOADER, "precision": LINE_SEARCH},
        variants={"rmsprop": {"optimizer": "rmsprop", "lr": 3e-3, "steps": 60, "report_every": 10}},
    ),
    ForeignTraining(
        name="hf_trainer",
        entry="main",
        takes="keywords",
        metric="eval_loss",
        mode="min",
        reports="huggingface",
        params={"learning_rate": 3e-3, "max_steps": 60},
        num_steps=60,
        num_reports=5,
        off={"batch": COUNTS_STEPS},
        resume="library",
        needs=("transformers", "accelerate"),
    ),
    ForeignTraining(
        name="hf_peft",
        entry="train",
        takes="config",
        metric="eval_accuracy",
        mode="max",
        reports="huggingface",
        params={"lr": 5e-3, "batch_size": 32, "r": 8, "epochs": 4, "seed": 0},
        num_steps=96,
        num_reports=5,
        off={"batch": COUNTS_STEPS},
        resume="library",
        needs=("transformers", "accelerate", "peft"),
    ),
    ForeignTraining(
        name="lightning_trainer",
        entry="train",
        takes="config",
        metric="val_loss",
        mode="min",
        reports="lightning",
        params={"lr": 5e-3, "batch_size": 32, "max_epochs": 6, "seed": 7},
        num_steps=192,
        num_reports=6,
        resume="library",
        needs=("lightning",),
        variants={"onecycle": {"lr": 5e-3, "batch_size": 32, "max_epochs": 6, "seed": 7, "scheduler": "onecycle"}},
    ),
    ForeignTraining(
        name="tabular_24_params",
        entry="train",
        takes="config",
        metric="val/auc",
        mode="max",
        params={},
        num_steps=222,
        num_reports=6,
        variants={
            "sgd": {
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
                "schedule": {"name": "cosine"},
                "clip": {"kind": "value", "value": 0.5},
                "norm": "batch",
                "hidden": [32, 32],
                "residual": True,
                "early_stopping": None,
                "oversample": False,
                "init_gain": 1.0,
            }
        },
    ),
    ForeignTraining(
        name="reinforce",
        entry="train",
        takes="keywords",
        metric="recent_return",
        mode="max",
        params={"lr": 0.01, "gamma": 0.99},
        num_steps=40,
        num_reports=8,
        off={"batch": NO_LOADER},
    ),
)

BY_NAME: Mapping[str, ForeignTraining] = {training.name: training for training in TRAININGS}
