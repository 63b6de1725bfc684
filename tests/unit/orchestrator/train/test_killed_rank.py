"""A rank that was killed is known to be gone by the time the others fail for want of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.unit.orchestrator.train import killed_rank

ROOT = Path(__file__).parents[4]


def test_ranks_know_that_one_is_gone_when_their_collective_raises(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(killed_rank.__file__)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, -signal.SIGKILL]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["text"], "the collective raised"
    assert (seen["before"], seen["after"]) == (False, True)
