from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from orchestrator.policies import simulator

FOLDER = Path(simulator.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="ascii")


def test_every_file_is_in_the_table() -> None:
    cells = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", "".join(cells)))
    assert named == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"))
def test_examples_in_docstrings_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"orchestrator.policies.simulator.{name}")).failed == 0


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    mean_s, makespan_s, _ = capsys.readouterr().out.split()
    assert 0 < float(mean_s) < float(makespan_s)
