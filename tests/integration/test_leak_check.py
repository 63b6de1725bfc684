"""The leak check of `tests/conftest.py` must itself be able to fail: run on tests that leave processes behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

CLEAN = "def test_clean():\n    subprocess.run(['true'], check=True)\n"
CHILD = "def test_child():\n    subprocess.Popen(['sleep', '301'])\n"
ORPHAN = "def test_orphan():\n    subprocess.run('sleep 302 & exit 0', shell=True, check=True)\n"


@pytest.mark.parametrize(
    ("body", "returncode", "message"),
    [
        (CLEAN, 0, "1 passed"),
        (CHILD, 1, "test_child left processes running"),
        (ORPHAN, 1, "test_leaky.py left processes running"),
    ],
    ids=["clean", "child", "orphan"],
)
def test_a_process_left_behind_fails_and_is_ended(tmp_path: Path, body: str, returncode: int, message: str) -> None:
    source = (
        CONFTEST.read_text().replace("_GRACE_S = 5.0", "_GRACE_S = 0.3").replace("_GRACE_S = 15.0", "_GRACE_S = 0.3")
    )
    (tmp_path / "conftest.py").write_text(source)
    (tmp_path / "test_leaky.py").write_text(f"import subprocess\n\n{body}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == returncode, result.stdout + result.stderr
    assert message in result.stdout
    sleeping = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "301"] not in sleeping
    assert ["sleep", "302"] not in sleeping
