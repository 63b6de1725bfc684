"""The command as a process: what it must not import, and how it ends on a closed pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PROBE = """
import json, sys
from orchestrator.cli import main
code = main(sys.argv[1:])
heavy = sorted(name for name in ("torch", "ray", "pandas", "pyarrow", "rich") if name in sys.modules)
print(json.dumps({"code": code, "heavy": heavy}), file=sys.stderr)
"""


def probe(tmp_path: Path, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-c", PROBE, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50, check=True
    )
    answer: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check", str(ROOT / "demo.yaml")),
        ("run", str(ROOT / "demo.yaml"), "--dry-run"),
        ("list",),
        ("doctor",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_light_command_imports_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert probe(tmp_path, *arguments) == {"code": 0, "heavy": []}


def test_help_imports_no_pydantic(tmp_path: Path) -> None:
    code = "import sys; from orchestrator.cli import main; main(['--help']); assert 'pydantic' not in sys.modules"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=50, capture_output=True
    )


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "orchestrator", "schema"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=50) in {0, 1}
