"""One run of the two-rank program, shared by the tests that read its results."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator

_PROGRAM = Path(__file__).with_name("two_ranks.py")
_ROOT = Path(orchestrator.__file__).parents[1]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case of `two_ranks.py` returned, by name without `case_`."""
    directory = tmp_path_factory.mktemp("two_ranks")
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(rank), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=55)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    results = torch.load(directory / "results.pt", weights_only=True)
    return {name.removeprefix("case_"): result for name, result in results.items()}
