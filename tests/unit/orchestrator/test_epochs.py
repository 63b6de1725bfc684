"""Epochs as the unit of reports: samples are counted before a run starts; what keeps them from it is one message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.beginning import with_counted_epochs
from orchestrator.config import load_config
from orchestrator.config.resolve import ResolvedRun
from orchestrator.errors import ConfigError

TRAINING = """
from torch.utils.data import IterableDataset

print("what is printed on the way")


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(100)


class Training:
    metric = "val_loss"

    def __init__(self, size: int = 1000, kind: str = "list"):
        self.size, self.kind = size, kind

    def train_data(self):
        if self.kind == "wrong":
            return undefined_name
        return Stream() if self.kind == "stream" else list(range(self.size))

    def build_model(self): ...
    def loss(self, model, batch): ...
    def build_optimizer(self, model): ...
    def evaluate(self, model): ...
"""


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "epochs_of_mine.py").write_text(TRAINING)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(epochs: int = 2, **params: Any) -> ResolvedRun:
        content = {
            "name": "r",
            "job": {"name": "epochs_of_mine:Training", "params": params},
            "trial": {"epochs_per_report": epochs},
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
        return load_config(tmp_path / "r.yaml")

    yield load
    sys.modules.pop("epochs_of_mine", None)


def test_a_report_is_as_many_samples_as_its_epochs_have(resolved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    counted = with_counted_epochs(resolved(size=300)).config
    assert (counted.samples_per_report, counted.trial.epochs_per_report) == (600, None)
    assert capsys.readouterr().out.splitlines()[-1] == "300 samples per epoch; a report every 600"
    assert with_counted_epochs(with_counted_epochs(resolved(size=300))).config == counted, "counted once"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "stream"}, "cannot be counted: the data is a stream without __len__; give trial.samples_per_report"),
        ({"kind": "wrong"}, "NameError: name 'undefined_name' is not defined"),
        ({"size": 0}, "Training.train_data() returned list without samples"),
        ({"size": 20}, "2 epochs are 40 samples; allowed: at least a step, of 128 with dials.batch.max_global"),
    ],
)
def test_what_cannot_be_counted_is_one_message_with_its_line(
    resolved: Any, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        with_counted_epochs(resolved(**params))
    assert message in str(error.value)
    assert "r.yaml:" in str(error.value)
    assert "trial.epochs_per_report" in str(error.value)


def test_a_job_of_the_table_counts_in_epochs_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "{name: r, job: {name: mlp, params: {num_samples: 512}}, trial: {epochs_per_report: 1}}"
    )
    assert with_counted_epochs(load_config(tmp_path / "r.yaml")).config.samples_per_report == 512
