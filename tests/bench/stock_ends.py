"""When trials of Ray Tune begin and end, kept as it happens: an arm that is ended early is evidence all the same.

Public hooks of Tune only. What a trial did is what it reported itself: steps, and the seconds it spent in them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback

Row = dict[str, Any]


class Ends(Callback):  # type: ignore[misc]  # Ray has no types
    """Appends a line of JSON for every trial that is through or was stopped by the scheduler.

    Args:
        out: the file.
        arm: of the search.
        num_trials: of the whole search.
    """

    def __init__(self, out: Path, arm: str, num_trials: int) -> None:
        self._out, self._arm, self._num_trials = out, arm, num_trials
        self._began_s, self._began_wall_s = time.monotonic(), time.time()
        self._started_s: dict[str, float] = {}
        self._last: dict[str, Row] = {}
        self._losses: dict[str, list[float | None]] = {}
        self.ended: list[Row] = []

    def begin(self) -> None:
        """Seconds count from here."""
        self._began_s, self._began_wall_s = time.monotonic(), time.time()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial was given its actor."""
        self._started_s.setdefault(trial.trial_id, self._now_s())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Row, **_: Any) -> None:
        """A trial has reported."""
        self._last[trial.trial_id] = dict(result)
        self._losses.setdefault(trial.trial_id, []).append(result.get("val_loss"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial is through, or was stopped."""
        row = {"trial": trial.trial_id, "ended_s": self._now_s(), **self._of(trial.trial_id)}
        self.ended.append(row)
        counts = f"{len(self.ended)} of {self._num_trials} trials had ended after {row['ended_s']:.1f} s"
        line = {
            "arm": self._arm,
            "so_far": counts,
            **row,
            "all_in_steps_s": self.in_steps_s,
            "reports": self.num_reports,
        }
        with self._out.open("a") as out:
            out.write(json.dumps(line, default=float) + "\n")
            out.flush()
            os.fsync(out.fileno())

    @property
    def in_steps_s(self) -> float:
        """Seconds inside the step loop, summed over all trials, up to the last report of each."""
        return float(sum(result.get("in_steps_s", 0.0) for result in self._last.values()))

    @property
    def num_reports(self) -> int:
        """Of all trials."""
        return sum(int(result.get("report", -1)) + 1 for result in self._last.values())

    @property
    def num_steps(self) -> int:
        """Of all trials, up to the last report of each."""
        return sum(int(result.get("steps", 0)) for result in self._last.values())

    def _of(self, trial_id: str) -> Row:
        last = self._last.get(trial_id, {})
        first_s = last.get("first_step_wall_s")
        return {
            "started_s": self._started_s.get(trial_id),
            "first_step_s": None if first_s is None else first_s - self._began_wall_s,
            "num_reports": int(last.get("report", -1)) + 1,
            "steps": last.get("steps", 0),
            "in_steps_s": last.get("in_steps_s", 0.0),
            "val_losses": self._losses.get(trial_id, []),
        }

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s
