"""What adapters do to a library, with libraries made here that have no more than is touched.

The real ones train in `tests/foreign/test_driven.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orchestrator.train.function import adapters, huggingface, lightning
from orchestrator.train.function.current import TrialInfo
from orchestrator.train.function.offers import Offers


class Host:
    """An attempt that remembers what it was asked."""

    def __init__(self, directory: Path, checkpoint: Path | None = None, metric: str = "loss") -> None:
        self.reports: list[tuple[dict[str, Any], Path | None]] = []
        self.offers = Offers(metric, lambda values, path: self.reports.append((dict(values), path)))
        self.checkpoint = checkpoint
        self.info = TrialInfo(trial_id="t", run="r", directory=directory, rank=0, world_size=1, attempt=0)
        self.held: list[str] = []
        self.frozen: list[bool] = []

    def hold_batch(self, why: str) -> None:
        self.held.append(why)

    def freeze_batch(self, *, is_frozen: bool) -> None:
        self.frozen.append(is_frozen)

    def begin_epoch(self, loader: Any) -> bool:
        return False


@pytest.fixture
def made_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and was not."""
    (tmp_path / "made_library.py").write_text("class Trainer:\n    name = 'plain'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "made_library"
    sys.modules.pop("made_library", None)


@contextmanager
def renamed(module: ModuleType, host: adapters.Host) -> Iterator[None]:
    module.Trainer.name = "adapted"
    yield
    module.Trainer.name = "plain"


@pytest.mark.parametrize("is_imported_before", [True, False])
def test_a_library_is_adapted_when_it_is_imported_and_put_back(
    made_library: str, tmp_path: Path, is_imported_before: bool
) -> None:
    finders = list(sys.meta_path)
    if is_imported_before:
        importlib.import_module(made_library)
    with adapters.installed(Host(tmp_path), {made_library: renamed, "never_imported": renamed}):
        module = importlib.import_module(made_library)
        assert module.Trainer.name == "adapted"
        assert importlib.import_module("json") is sys.modules["json"]
        assert importlib.util.find_spec("no_module_of_that_name") is None
    assert module.Trainer.name == "plain"
    assert sys.meta_path == finders


class Callback:
    """Of either library: has every hook that is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *_args, **_kwargs: None
        raise AttributeError(name)


class HuggingFaceTrainer:
    """Two steps, an evaluation and a checkpoint after each."""

    def __init__(self, model: object = None, args: Any = None, callbacks: Any = None) -> None:
        self.args, self.callbacks = args, list(callbacks or ())
        self.resumed: Any = "never trained"
        self.step = 0

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def call(self, event: str, **more: Any) -> None:
        state = SimpleNamespace(global_step=self.step)
        for callback in self.callbacks:
            getattr(callback, event)(self.args, state, None, **more)

    def train(self, resume_from_checkpoint: Any = None) -> None:
        self.resumed = resume_from_checkpoint
        self.call("on_train_begin")
        for _ in range(2):
            self.call("on_step_begin")
            self.step += 1
            self.evaluate()
            path = Path(self.args.output_dir) / f"checkpoint-{self.step}"
            path.mkdir(parents=True, exist_ok=True)
            (path / huggingface.STATE).touch()
            self.call("on_save")
        self.call("on_train_end")

    def evaluate(self) -> None:
        self.call("on_evaluate", metrics={"loss": 1.0 / (1 + self.step)})


@pytest.fixture
def transformers() -> Any:
    class Trainer(HuggingFaceTrainer):
        def __init__(self, model: object = None, args: Any = None, callbacks: Any = None) -> None:
            super().__init__(model, args, callbacks)

        def train(self, resume_from_checkpoint: Any = None) -> None:
            super().train(resume_from_checkpoint)

    return SimpleNamespace(Trainer=Trainer, TrainerCallback=Callback)


def test_evaluations_are_reports_with_the_checkpoint_of_their_step(transformers: Any, tmp_path: Path) -> None:
    host = Host(tmp_path)
    with huggingface.adapted(transformers, host):
        trainer = transformers.Trainer(args=SimpleNamespace(output_dir=str(tmp_path / "work" / "out")))
        trainer.train()
        trainer.evaluate()
    host.offers.settle()
    out = tmp_path / "work" / "out"
    assert host.reports == [
        ({"loss": 1 / 2}, out / "checkpoint-1"),
        ({"loss": 1 / 3}, out / "checkpoint-2"),
        ({"loss": 1 / 3}, None),
    ]
    assert trainer.resumed is None
    assert host.held == [huggingface.COUNTS_STEPS]


def test_a_callback_of_the_users_that_reports_is_not_reported_twice(transformers: Any, tmp_path: Path) -> None:
    host = Host(tmp_path)

    class Reporting(Callback):
        def on_save(self, *_args: Any, **_kwargs: Any) -> None:
            host.offers.stand_back()  # what the driver does when the function reports

    with huggingface.adapted(transformers, host):
        trainer = transformers.Trainer(args=SimpleNamespace(output_dir="out"), callbacks=[Reporting()])
        trainer.args.output_dir = str(tmp_path / "out")
        trainer.train()
    assert host.reports == []


@pytest.mark.parametrize(("asked", "is_filled"), [(None, True), (True, True), ("inside", True), ("elsewhere", False)])
def test_a_later_attempt_goes_on_from_the_kept_checkpoint_unless_another_is_named(
    transformers: Any, tmp_path: Path, asked: Any, is_filled: bool
) -> None:
    trial = tmp_path / "t"
    kept = trial / "resumed"
    kept.mkdir(parents=True)
    (kept / huggingface.STATE).touch()
    asked = {"inside": str(trial / "work" / "checkpoint-9"), "elsewhere": str(tmp_path / "pretrained")}.get(
        asked, asked
    )
    host = Host(trial, checkpoint=kept)
    with huggingface.adapted(transformers, host):
        arguments = SimpleNamespace(output_dir=str(trial / "work" / "out"))
        first, second = transformers.Trainer(args=arguments), transformers.Trainer(args=arguments)
        first.train(asked)
        second.train()
    assert first.resumed == (str(kept) if is_filled else asked)
    assert second.resumed is None  # it is not the first one's to go on from
    assert [path is not None for _, path in host.reports] == [True, True, False, False]


def test_a_shared_output_directory_is_moved_into_the_trial(
    transformers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trial = tmp_path / "trials" / "t"
    shared = tmp_path / "results"
    with huggingface.adapted(transformers, Host(trial)):
        moved = transformers.Trainer(args=SimpleNamespace(output_dir=str(shared)))
        kept = transformers.Trainer(args=SimpleNamespace(output_dir="results"))
        positional = transformers.Trainer(None, SimpleNamespace(output_dir=None, logging_dir=str(shared / "logs")))
        transformers.Trainer()
    assert Path(positional.args.logging_dir) == trial / "work" / (shared / "logs").relative_to("/")
    assert Path(moved.args.output_dir) == trial / "work" / shared.relative_to("/")
    assert kept.args.output_dir == "results"
    assert f"output_dir {shared} would be that of all trials" in caplog.text


def lightning_module() -> Any:
    class Trainer:
        """Epochs of one step; validates and writes a checkpoint after each."""

        def __init__(self, *, default_root_dir: Any = None, callbacks: Any = None, validates: bool = True) -> None:
            self.default_root_dir, self.callbacks, self.enable_validation = default_root_dir, callbacks or [], validates
            self.checkpoint_callbacks = [each for each in self.callbacks if hasattr(each, "dirpath")]
            self.callback_metrics: dict[str, float] = {}
            self.state, self.sanity_checking = SimpleNamespace(fn="fit"), True
            self.global_step, self.reload_dataloaders_every_n_epochs = 0, 0
            self.val_check_interval, self.check_val_every_n_epoch, self.val_check_batch = 1.0, 1, 1
            self.train_dataloader, self.fit_loop = object(), SimpleNamespace(_combined_loader=object())
            self.resumed: Any = "never trained"

        def call(self, event: str, *more: Any) -> None:
            for callback in self.callbacks:
                getattr(callback, event)(self, None, *more)

        def fit(self, model: object, ckpt_path: Any = None) -> None:
            self.resumed = ckpt_path
            self.call("on_validation_end")
            self.sanity_checking = False
            for _ in range(2):
                self.call("on_train_epoch_start")
                self.call("on_train_batch_start", None, 0)
                self.global_step += 1
                if self.enable_validation:
                    self.callback_metrics["loss"] = 1 / (1 + self.global_step)
                    self.call("on_validation_end")
                self.callback_metrics["train_loss"] = float(self.global_step)
                self.save_checkpoint(Path(self.default_root_dir) / f"{self.global_step}.ckpt")
                self.call("on_train_epoch_end")
            self.call("on_train_end")

        def save_checkpoint(self, filepath: Any, weights_only: bool | None = None) -> None:
            Path(filepath).parent.mkdir(parents=True, exist_ok=True)
            Path(filepath).write_text("state")

    return SimpleNamespace(Trainer=Trainer, Callback=Callback)


@pytest.mark.parametrize("validates", [True, False])
def test_logged_metrics_are_reports_when_validated_or_at_the_end_of_an_epoch(tmp_path: Path, validates: bool) -> None:
    host, module = Host(tmp_path), lightning_module()
    handed: list[str] = []

    def report(values: Mapping[str, Any], path: Path | None) -> None:
        host.reports.append((dict(values), path))
        handed.append("" if path is None else path.name)

    host.offers = Offers("loss" if validates else "train_loss", report)
    with lightning.adapted(module, host):
        trainer = module.Trainer(default_root_dir=tmp_path / "work", validates=validates)
        trainer.fit(None)
    assert [values["train_loss"] for values, _ in host.reports] == [1.0, 2.0]
    assert handed == ["1.ckpt", "2.ckpt"]
    assert host.frozen == [True, False]
    assert host.held == []


def test_lightnings_later_attempt_goes_on_from_the_kept_checkpoint(tmp_path: Path) -> None:
    kept = tmp_path / "t" / "resumed"
    kept.mkdir(parents=True)
    (kept / "epoch=1.ckpt").touch()
    module = lightning_module()
    with lightning.adapted(module, Host(tmp_path / "t", checkpoint=kept)):
        first, second = (module.Trainer(default_root_dir=tmp_path / "t" / "work") for _ in range(2))
        first.fit(None, ckpt_path="last")
        second.fit(None)
    assert first.resumed == str(kept / "epoch=1.ckpt")
    assert second.resumed is None
    with lightning.adapted(module, Host(tmp_path / "t", checkpoint=kept)):
        named = module.Trainer(default_root_dir=tmp_path / "t" / "work")
        named.fit(None, ckpt_path="mine.ckpt")
    assert named.resumed == "mine.ckpt"


def test_lightnings_shared_directories_are_moved_into_the_trial(tmp_path: Path) -> None:
    trial, shared, module = tmp_path / "trials" / "t", tmp_path / "shared", lightning_module()
    checkpointing = SimpleNamespace(dirpath=str(shared / "best"))
    with lightning.adapted(module, Host(trial)):
        moved = module.Trainer(default_root_dir=shared, callbacks=[checkpointing])
        kept = module.Trainer(default_root_dir="mine")
    assert Path(moved.default_root_dir) == trial / "work" / shared.relative_to("/")
    assert Path(checkpointing.dirpath) == trial / "work" / (shared / "best").relative_to("/")
    assert kept.default_root_dir == "mine"


@pytest.mark.parametrize(
    ("attribute", "value", "why"),
    [
        ("reload_dataloaders_every_n_epochs", 1, lightning.RELOADS),
        ("val_check_interval", 3, lightning.COUNTS_BATCHES),
        ("fit_loop", SimpleNamespace(), lightning.UNKNOWN),
    ],
)
def test_where_lightning_would_lose_its_validation_the_batch_is_off(
    tmp_path: Path, attribute: str, value: object, why: str
) -> None:
    host, module = Host(tmp_path), lightning_module()
    with lightning.adapted(module, host):
        trainer = module.Trainer(default_root_dir=tmp_path / "work")
        setattr(trainer, attribute, value)
        trainer.fit(None)
    assert set(host.held) == {why}
