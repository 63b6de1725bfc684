"""Three real faults in one run of three trials: it ends with the very results of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.real import disturbed, undisturbed

pytestmark = pytest.mark.timeout(600)

FAULTS = ("disk full, actor killed", "rank stopped", "actor stopped")


def test_a_full_disk_a_hung_rank_and_a_hung_actor_change_no_result(tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    wanted = undisturbed(tmp_path / "twin")
    try:
        found = disturbed(tmp_path / "small", FAULTS, 1, wanted)
    except PermissionError as error:
        pytest.skip(str(error))
    assert len(found.faults) == len(FAULTS)
    assert found.violations == ()
