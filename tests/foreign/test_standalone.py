"""Every training of this folder runs by itself, the same each time, and knows nothing of the orchestrator.

Slower than a unit test: each pair of processes imports its library. Both run side by side, on one core each.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from tests.foreign.losses import finish_plain, recorded, start_plain
from tests.foreign.trainings import FOLDER, TRAININGS, ForeignTraining

OURS = {"driven.py", "losses.py", "trainings.py"}
EACH = pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)


def skip_without_its_libraries(training: ForeignTraining) -> None:
    missing = [name for name in training.needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, not installed here")


def test_the_table_names_every_file_of_the_folder() -> None:
    found = {path.name for path in FOLDER.glob("*.py") if not path.name.startswith("test_")} - OURS
    assert {training.path.name for training in TRAININGS} == found


@EACH
def test_a_training_does_not_mention_the_orchestrator(training: ForeignTraining) -> None:
    source = training.path.read_text(encoding="ascii")
    assert "orchestrator" not in source.lower()
    # Nor does it lean on a neighbour in this folder: it is one file.
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not any(name.startswith("tests") or name in {path.stem for path in FOLDER.glob("*.py")} for name in imported)


@EACH
@pytest.mark.timeout(240)  # imports take most of it, and other work may share the cores
def test_a_training_runs_by_itself_and_repeats_every_loss(training: ForeignTraining, tmp_path: Path) -> None:
    skip_without_its_libraries(training)
    directories = [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        directory.mkdir()
    processes = [start_plain(training, directory) for directory in directories]
    try:
        (first, printed), (second, _) = [
            finish_plain(process, directory) for process, directory in zip(processes, directories, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert first == second
    assert all(step.losses and all(map(math.isfinite, step.losses)) for step in first.steps)
    assert sum(step.optimizer == 0 for step in first.steps) == training.num_steps
    assert re.split("[_/]", training.metric)[-1] in printed
    if training.reports.startswith("ray."):
        assert len(first.reports) == (training.num_reports if training.reports_alone else 0)
        assert all(math.isfinite(report[training.metric]) for report in first.reports)


@EACH
def test_the_parameters_of_the_table_fit_the_entry_point(training: ForeignTraining) -> None:
    names = training.signature()
    for params in (training.params, *training.variants.values()):
        if training.takes == "config":
            assert names == ["config"]
        else:
            assert set(params) <= set(names)


def test_a_step_is_recorded_with_every_loss_since_the_step_before() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    plain, closed = torch.optim.SGD([weight], lr=0.0), torch.optim.LBFGS([weight], lr=0.0, max_iter=1)

    def closure() -> torch.Tensor:
        loss = 3 * weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    backward = torch.Tensor.backward
    with recorded() as seen:
        for scale in (1.0, 2.0):
            (scale * weight).sum().backward()  # type: ignore[no-untyped-call]
        plain.step()
        closed.step(closure)  # type: ignore[no-untyped-call]
        plain.step()
    assert [(step.optimizer, step.losses) for step in seen.steps] == [(0, (1.0, 2.0)), (1, (3.0,)), (0, ())]
    plain.step()
    assert len(seen.steps) == 3
    assert torch.Tensor.backward is backward
