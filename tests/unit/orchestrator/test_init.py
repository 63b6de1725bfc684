"""`orchestrator init` for trainings of one's own: what it writes passes `check`, and says the right things."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main, orchestrator
from orchestrator.config import load_config
from orchestrator.jobs import job_info, own

TRAINING = """
from ray import tune

def train(learning_rate, hidden: int, name="a: b", sizes=(1, 2), eps=1e-8, flag=True):
    for epoch in range(3):
        tune.report({"epoch": epoch, "val_accuracy": 0.5})

def loose(config):
    print(config)

class Net:
    metric, mode = "dice", "max"
    samples_per_report = 640
    def __init__(self, width: int = 3): ...
    def build_model(self): ...
    def train_data(self): ...
    def loss(self, model, batch): ...
    def build_optimizer(self, model): ...
    def evaluate(self, model): ...
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "init_mine.py").write_text(TRAINING)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("init_"):
            del sys.modules[name]
    importlib.invalidate_caches()
    own._loaded.cache_clear()
    own.info_of.cache_clear()


def init(*arguments: str) -> str:
    result = CliRunner().invoke(orchestrator, ["init", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_parameters_and_metric_are_those_of_the_function(project: Path) -> None:
    init("--job", "init_mine:train")
    config = load_config("run.yaml").config
    assert {name: each.kind for name, each in config.search.one_space.items()} == {
        "learning_rate": "loguniform",
        "hidden": "choice",
    }
    assert config.job.params == {"name": "a: b", "sizes": [1, 2], "eps": 1e-8, "flag": True}
    assert (config.search.metric, config.search.mode) == ("val_accuracy", "max")
    assert config.trial.max_reports is None
    columns = {line.index("  # ") for line in Path("run.yaml").read_text().splitlines() if re.search(r"\S  +# ", line)}
    assert min(columns) == 31, "where the comments begin"


def test_of_a_function_that_says_nothing_there_is_a_metric_to_replace(project: Path) -> None:
    init("--job", "init_mine:loose")
    search = load_config("run.yaml").config.search
    assert (search.metric, search.mode, dict(search.one_space)) == ("loss", "min", {})


def test_of_a_class_the_declaration_counts(project: Path) -> None:
    init("--job", "init_mine:Net")
    config = load_config("run.yaml").config
    assert (config.search.metric, config.search.mode, config.samples_per_report) == ("dice", "max", 640)


@pytest.mark.parametrize(("job", "kind"), [("init_new:train", "function"), ("init_package.new:Points", "training")])
def test_where_there_is_no_such_module_a_small_training_is_written_that_runs(
    project: Path, job: str, kind: str
) -> None:
    file = Path(*job.partition(":")[0].split(".")).with_suffix(".py")
    assert f"wrote {file}\nwrote run.yaml" in init("--job", job)
    config = load_config("run.yaml").config
    assert job_info(config.job.key).kind == kind
    assert config.search.metric == {"function": "val_loss", "training": "accuracy"}[kind]
    if kind == "function":
        own.call_function(job, {"lr": 0.01, "epochs": 1})
    else:
        built = own.load(job)()
        model = built.build_model()
        batch = next(iter(built.train_data()))
        built.loss(model, batch).backward()
        built.build_optimizer(model).step()
        assert 0 <= built.evaluate(model)["accuracy"] <= 1


def test_nothing_is_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    assert main(["init", "--job", "init_new:train"]) == 2
    assert "run.yaml: exists already and is not overwritten" in capsys.readouterr().err
    assert not Path("init_new.py").exists()
    init("other.yaml", "--job", "init_mine:train")
    assert Path("init_mine.py").read_text() == TRAINING


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("init_mine:nope", "has no 'nope'"),
        ("a b:c", "or package.module:name of your own"),
        ("nope", "or package.module:name"),
    ],
)
def test_a_wrong_job_is_one_message(project: Path, job: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--job", job]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run.yaml").exists()


def test_a_module_of_a_library_reports_in_epochs(project: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'ray-orchestrator[lightning]'")
    models = "tests.unit.jobs.library_models"
    init("--job", f"{models}:Classifier", "--data", f"{models}:Points")
    config = load_config("run.yaml").config
    assert (config.trial.epochs_per_report, config.trial.samples_per_report) == (1, None)
    assert config.search.metric in {"val_loss", "train_loss"}
    assert set(config.search.one_space) == {"lr"}
