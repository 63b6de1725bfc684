"""What others can have written is not unpickled: nothing of it is read before owners and modes were looked at."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from orchestrator.api import Run
from orchestrator.driver import resume
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.storage_trust import require_trusted


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "r"
    commit = path / "trials" / "t0" / "checkpoints" / "step-3"
    commit.mkdir(parents=True)
    (commit / ".metadata").write_bytes(pickle.dumps("x"))
    (path / "run.yaml").write_text("name: r\njob: {name: mlp}\n")
    (path / "status.json").write_text("{}")
    path.chmod(0o700)
    return path


def test_a_private_directory_is_believed_whatever_the_modes_in_it(run_dir: Path) -> None:
    (run_dir / "run.yaml").chmod(0o666)
    require_trusted(run_dir)


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702, 0o720])
def test_one_that_others_can_write_is_refused_before_anything_of_it_is_read(run_dir: Path, mode: int) -> None:
    run_dir.chmod(mode)
    with pytest.raises(ConfigError, match=r"may be written by others \(mode 0\d+\).*--trust-storage"):
        resume(run_dir)
    with pytest.raises(ConfigError, match="--trust-storage"):
        Run(run_dir).source()
    require_trusted(run_dir, is_trusted=True)
    with pytest.raises(OrchestratorError, match="no trial has"):
        Run(run_dir, trust_storage=True).source()


def test_a_checkpoint_that_others_can_write_and_reach_is_refused(run_dir: Path) -> None:
    commit = run_dir / "trials" / "t0" / "checkpoints" / "step-3"
    run_dir.chmod(0o755)
    (commit / ".metadata").chmod(0o664)
    with pytest.raises(ConfigError, match=r"\.metadata may be written by others"):
        require_trusted(run_dir)
    (commit / ".metadata").chmod(0o644)
    require_trusted(run_dir)
    commit.chmod(0o777)
    with pytest.raises(ConfigError, match="step-3 may be written by others"):
        require_trusted(run_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_refused(run_dir: Path) -> None:
    metadata = run_dir / "trials" / "t0" / "checkpoints" / "step-3" / ".metadata"
    os.chown(metadata, 12345, -1)
    with pytest.raises(ConfigError, match=r"\.metadata belongs to user 12345, not to you \(0\)"):
        require_trusted(run_dir)
    os.chown(metadata, 0, -1)
    os.chown(run_dir, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        require_trusted(run_dir)
