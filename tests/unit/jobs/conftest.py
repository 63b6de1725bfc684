"""A small folder of text to train on, and jobs built from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.corpus import is_held_out
from orchestrator.jobs.job import Job

SMALL: dict[str, dict[str, object]] = {
    "mlp": {"num_samples": 256},
    "language": {"width": 16, "layers": 1, "heads": 2, "context": 16, "eval_windows": 8},
    "image": {"data": "shapes", "width": 16, "layers": 1, "heads": 2, "patch": 4, "max_samples": 128},
    "image-resnet": {"data": "shapes", "model": "resnet", "width": 8, "layers": 1, "max_samples": 128},
    "tissue": {"data": "cells", "width": 4, "levels": 2, "size": 16},
    "speech": {"data": "signal", "width": 16, "layers": 1, "heads": 2, "max_samples": 24, "eval_samples": 12},
    "genome": {"width": 8, "length": 24, "max_samples": 256, "eval_samples": 256},
}
"""Each job in its smallest form, on data that needs no library; what follows a dash tells forms of a job apart."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 60 small text files, at least one of them held out, and hidden ones that do not count."""
    root = tmp_path_factory.mktemp("sources")
    names = [f"pkg{i % 3}/module_{i}{('.py', '.txt', '')[i % 3]}" for i in range(60)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"def function_{i}(x):\n    return x * {i} + {i * i}\n" * 4)
    for ignored in (".git/config", "pkg0/.hidden.py"):
        (root / ignored).parent.mkdir(exist_ok=True)
        (root / ignored).write_text("IGNORED\n")
    assert 0 < sum(map(is_held_out, names)) < 10
    return root


@pytest.fixture(params=list(SMALL))
def job(request: pytest.FixtureRequest, source_dir: Path) -> Job:
    """Each job in its smallest form, prepared."""
    params = dict(SMALL[request.param])
    if request.param == "language":
        params["data_dir"] = str(source_dir)
    built = build_job(request.param.partition("-")[0], params)
    built.prepare()
    return built
