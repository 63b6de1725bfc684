from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, JournalError
from orchestrator.policies import build_policy
from orchestrator.simulate.course import course_of, play
from tests.run_directory import CHEAPER, RunDirectory, healthy_run, records


def recorded(path: Path) -> Path:
    """Two trials, steps of 0.1 s of each."""
    run = healthy_run(path)
    for trial_id in ("a", "b"):
        steps = records(60, seq=10, step=10, cursor=80, generation=2, settings=CHEAPER, start_s=21.0)
        steps["cores"] = 0.5
        run.record(trial_id, steps)
    return run.write()


def test_a_run_is_played_again_from_what_it_wrote(tmp_path: Path) -> None:
    course = course_of(recorded(tmp_path / "demo"))
    assert course.order == ("a", "b")
    assert (course.num_slots, dict(course.reports)) == (2, {"a": 2, "b": 2})
    assert course.num_samples == {"a": 80, "b": 80}
    assert course.noise == {"a": 1.0, "b": 1.0}
    first, second = (play(course, build_policy("fair_share"), "fair_share") for _ in range(2))
    assert first == second
    assert first.num_ended == 2
    assert 0 < first.makespan_s < 100


def test_what_is_no_run_or_has_no_course_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        course_of(tmp_path)
    empty = RunDirectory(tmp_path / "empty")
    empty.begin("a")
    with pytest.raises(JournalError, match="there is no course to simulate"):
        course_of(empty.write())
