"""The search file of each job: valid, named after the job, and with every dial turning."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import load_config

SEARCHES = sorted((Path(__file__).parents[2] / "jobs" / "searches").glob("*.yaml"))


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_a_search_file_is_valid_and_turns_every_dial(path: Path) -> None:
    config = load_config(path, []).config
    assert config.name == config.job.name == path.stem
    assert config.dials.share.enabled
    assert config.dials.batch.enabled
    assert config.dials.precision.enabled
    assert config.policy.name == "goodput"
