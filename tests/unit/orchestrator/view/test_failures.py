"""Alike failures are told once, with the user's own traceback."""

from __future__ import annotations

from pathlib import Path

from orchestrator.view.failures import common_error, failure_lines, traceback_in

LOG = """2026-11-30 17:57:49,521 INFO orchestrator.train.serve: trial t attempt 0 begins: {}
2026-11-30 17:57:49,544 ERROR orchestrator.train.serve: trial t failed
Traceback (most recent call last):
  File "bad.py", line 4, in boom
    return undefined_name + x
NameError: name 'undefined_name' is not defined
2026-11-30 17:57:49,546 INFO orchestrator.train.serve: trial t attempt 0 ends: failed
"""


def failed(log: Path, error: str = "NameError: mine (bad.py:4)", name: str = "t") -> dict[str, object]:
    return {"trial_id": name, "state": "failed", "error": error, "log_path": str(log)}


def test_the_traceback_of_a_log_is_found_without_the_lines_around_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(LOG)
    lines = traceback_in(str(log))
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "NameError: name 'undefined_name' is not defined"
    assert traceback_in(str(tmp_path / "none")) == []


def test_trials_that_failed_alike_are_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(LOG)
    done: dict[str, object] = {"trial_id": "w", "state": "done"}
    trials = [failed(log), failed(log, name="u"), failed(log, "OSError: other", "v"), done]
    lines = failure_lines(trials)
    assert [line for line in lines if not line.startswith("    ")] == [
        f"t failed: NameError: mine (bad.py:4); log: {log}; so did 1 other trial",
        f"v failed: OSError: other; log: {log}",
    ]
    assert sum("NameError: name" in line for line in lines) == 2


def test_an_error_is_common_only_if_every_trial_that_ended_has_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    alike = [failed(log), failed(log, name="u")]
    assert common_error({"trials": [*alike, {"state": "running"}]}, 2) == "NameError: mine (bad.py:4)"
    assert common_error({"trials": alike}, 3) is None
    assert common_error({"trials": [*alike, {"state": "done"}]}, 2) is None
    assert common_error({"trials": [*alike, failed(log, "OSError: other")]}, 2) is None
    assert common_error({"trials": []}, 0) is None
