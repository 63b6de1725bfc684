"""Every schedule with one fault of the journal or one kill of the actor, and many with two. No Ray; two minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.test_failpoints import Fault, Stage, outcome, play, two_faults

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return play(tmp_path_factory.mktemp("undisturbed") / "r", {})


@pytest.mark.parametrize("fault", list(Fault))
def test_one_fault_at_any_write_loses_and_doubles_nothing(tmp_path: Path, undisturbed: Stage, fault: Fault) -> None:
    for number, kinds in enumerate(undisturbed.writes, start=1):
        stage = play(tmp_path / str(number), {number: fault})
        assert stage.faults == {}, "it has struck"
        assert outcome(stage) == outcome(undisturbed), (number, kinds)
        assert verify(stage.run_dir)["violations"] == [], (number, kinds)


def test_two_faults_at_any_writes_lose_and_double_nothing(tmp_path: Path, undisturbed: Stage) -> None:
    for seed in range(150):
        stage = play(tmp_path / str(seed), two_faults(len(undisturbed.writes), seed))
        assert outcome(stage) == outcome(undisturbed), seed
        assert verify(stage.run_dir)["violations"] == [], seed
