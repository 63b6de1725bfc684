"""One run as the values of its page: what `load_run` reads, and the courses of its trials.

Works while the run goes on: it reads what is there. Writes nothing. Called by `build`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config.words import printable
from orchestrator.control.events import Acknowledged, GainRealised, PlanCommitted, PlanRefused, RunBegan, SlotChanged
from orchestrator.control.journal import History, read_history
from orchestrator.names import is_safe_name
from orchestrator.run_dirs import read_status, state_of
from orchestrator.telemetry.load import RunTables, tables_of
from orchestrator.view.failures import traceback_in
from orchestrator.view.page import steps as step_records
from orchestrator.view.page.course import Course, courses_of
from orchestrator.view.page.device_use import device_pages
from orchestrator.view.page.importance import importance_of
from orchestrator.view.page.thinning import plain, rounded
from orchestrator.view.page.values import Change, Curve, DialPage, Gain, Importance, RunPage, TrialPage
from orchestrator.view.page.why import Reasons
from orchestrator.view.text import clean, mapping

_POINTS, _LEAST_POINTS, _MOST_POINTS = 15_000, 40, 400
_CHANGES, _LEAST_CHANGES, _MOST_CHANGES = 12_000, 20, 400
"""Of all trials together, and of each at least and at most."""
_MANY_TRIALS = 200
_TAIL_BYTES = 1 << 16
_MAX_METRICS = 20
_LINE_CHARACTERS = 240


def gather(run_dir: Path) -> RunPage:
    """Read a run.

    Raises:
        ConfigError: the directory is no run.
        TelemetryError, JournalError: a newer version wrote it.
    """
    history = read_history(run_dir)
    return _Gathering(run_dir, history, read_status(run_dir) or {}).page()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """How much of each trial there is room for."""

    points: int
    changes: int
    log_lines: int
    failure_lines: int

    @classmethod
    def of(cls, num_trials: int) -> _Room:
        is_many = num_trials > _MANY_TRIALS
        return cls(
            points=min(max(_POINTS // max(num_trials, 1), _LEAST_POINTS), _MOST_POINTS),
            changes=min(max(_CHANGES // max(num_trials, 1), _LEAST_CHANGES), _MOST_CHANGES),
            log_lines=4 if is_many else 12,
            failure_lines=12 if is_many else 40,
        )


class _Gathering:
    """What the parts of a run's page are made from."""

    def __init__(self, run_dir: Path, history: History, status: Mapping[str, Any]) -> None:
        self._run_dir, self._history, self._status = run_dir, history, status
        self._tables: RunTables = tables_of(run_dir, history, status)
        began = next(history.of(RunBegan), None)
        self._spec: Mapping[str, Any] = {} if began is None else began.spec
        self._metric = str(self._spec.get("metric") or status.get("metric") or "metric")
        self._mode = str(self._spec.get("mode") or status.get("mode") or "min")
        self._origin_s = history.entries[0].wall_s if history.entries else 0.0
        last_s = history.entries[-1].wall_s if history.entries else 0.0
        told_s = status.get("updated_at")
        is_told = bool(last_s) and isinstance(told_s, int | float) and math.isfinite(told_s)
        self._elapsed_s = max(last_s, float(told_s or 0.0) if is_told else 0.0) - self._origin_s
        allocations = {
            (row["generation"], row["trial_id"]): row
            for row in self._tables.plans.select(["generation", "trial_id", "reason", "predicted_gain"]).to_pylist()
        }
        self._courses = courses_of(history, allocations, self._elapsed_s)
        self._reasons = Reasons(history, self._courses, self._metric, self._mode)
        self._notes = list(self._tables.notes)

    def page(self) -> RunPage:
        """The whole run."""
        trials = self._trials()
        searched = self._searched(trials)
        names = {name for trial in trials for name in trial.params}
        return RunPage(
            name=clean(self._run_dir.name),
            state=state_of(self._run_dir, dict(self._status)) if self._status else self._tables.state,
            policy=clean(self._spec.get("policy") or self._status.get("policy") or "-"),
            metric=self._metric,
            mode=self._mode,
            started_at=self._origin_s or None,
            elapsed_s=rounded(self._elapsed_s) or 0.0,
            device_s=rounded(sum(trial.device_s for trial in trials)) or 0.0,
            num_decisions=sum(1 for _ in self._history.of(PlanCommitted)),
            num_refusals=sum(1 for _ in self._history.of(PlanRefused)),
            trouble=clean(self._status.get("trouble") or ""),
            searched=searched,
            fixed=tuple(sorted(names - set(searched))),
            trials=trials,
            gains=self._gains(),
            dials=self._dials(),
            devices=device_pages(self._tables.devices, self._courses, self._kinds(), self._origin_s, self._elapsed_s),
            importance=self._importance(trials, searched),
            best_so_far=self._best_so_far(),
            notes=tuple(self._notes),
        )

    def _trials(self) -> tuple[TrialPage, ...]:
        rows = self._tables.trials.to_pylist()
        room = _Room.of(len(rows))
        records = {
            trial_id: step_records.page_of(columns, self._courses[trial_id], room.points)
            for trial_id, columns in step_records.by_trial(self._tables.steps)
            if trial_id in self._courses
        }
        names = Counter(
            name for course in self._courses.values() for _, entry in course.reports[-1:] for name in entry.metrics
        )
        names.pop("", None)  # the key of the training loss
        shown = sorted(names, key=lambda name: (name != self._metric, name))
        if len(shown) > _MAX_METRICS:
            self._notes.append(f"{len(shown)} metrics were reported; the page has the first {_MAX_METRICS} by name")
        return tuple(
            self._trial(row, records.get(row["trial_id"], step_records.NOTHING), shown[:_MAX_METRICS], room)
            for row in rows
        )

    def _trial(
        self, row: Mapping[str, Any], records: step_records.StepsPage, metrics: Sequence[str], room: _Room
    ) -> TrialPage:
        trial_id, state = str(row["trial_id"]), str(row["state"])
        course = self._courses.get(trial_id, Course())
        curves = {name: curve for name in metrics if (curve := _reported(course, name, room.points)) is not None}
        values = [value for value in _values(course, self._metric) if value is not None]
        end = np.array([self._elapsed_s])
        return TrialPage(
            trial_id=trial_id,
            state=state,
            best=rounded((max if self._mode == "max" else min)(values)) if values else None,
            last=rounded(values[-1]) if values else None,
            why=self._reasons.of(trial_id, state, str(row.get("error") or "")),
            log=self._log(trial_id, state, room),
            params={
                name.removeprefix("param."): _param(value)
                for name, value in row.items()
                if name.startswith("param.") and value is not None
            },
            step=row.get("step"),
            num_samples=row.get("num_samples"),
            seconds=rounded(float(course.seconds_at(end)[0])) or 0.0,
            device_s=rounded(float(course.device_s_at(end)[0])) or 0.0,
            curves={**({} if records.loss is None else {"": records.loss}), **curves},
            stays=tuple(course.stays),
            dials=tuple(course.dials[-room.changes :]),
            changes=_newest(course.changes, room.changes),
            num_changes=len(course.changes),
            execution=records.execution,
            memory=records.memory,
        )

    def _searched(self, trials: Sequence[TrialPage]) -> tuple[str, ...]:
        """Parameters that the run file does not fix, or that differ all the same."""
        fixed = mapping(self._spec.get("params"))
        names = sorted({name for trial in trials for name in trial.params})
        return tuple(
            name for name in names if name not in fixed or len({str(trial.params.get(name)) for trial in trials}) > 1
        )

    def _log(self, trial_id: str, state: str, room: _Room) -> tuple[str, ...]:
        """The end of a trial's log; of one that failed, its last traceback."""
        if state == "done" or not is_safe_name(trial_id):
            return ()
        path = self._run_dir / "trials" / trial_id / "log.txt"
        if state == "failed":
            found = traceback_in(str(path))
            if found:
                return tuple(found[-room.failure_lines :])
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
        except OSError:
            return ()
        last = deque(text.splitlines(), maxlen=room.log_lines)
        return tuple(printable(line.expandtabs(), _LINE_CHARACTERS) for line in last)

    def _gains(self) -> tuple[Gain, ...]:
        return tuple(
            Gain(
                dial=clean(gain.dial),
                trial_id=gain.trial_id,
                t_s=rounded(gain.wall_s - self._origin_s) or 0.0,
                generation=int(gain.generation),
                predicted=rounded(gain.predicted),
                realised=rounded(gain.realised) or 0.0,
            )
            for gain in self._history.of(GainRealised)
        )

    def _dials(self) -> tuple[DialPage, ...]:
        turned = Counter(dial for ack in self._history.of(Acknowledged) for dial in ack.dials)
        enabled = [str(dial) for dial in self._spec.get("dials") or ()]
        names = dict.fromkeys([*("share", "batch", "precision"), *enabled, *turned])
        return tuple(DialPage(name=name, is_enabled=name in enabled, num_changes=turned[name]) for name in names)

    def _kinds(self) -> dict[str, str]:
        """Of each device that a slot named, its kind: cpu or gpu."""
        hellos = [entry.hello for entry in self._history.of(SlotChanged) if entry.hello is not None]
        return {device.device_id: device.kind.value for hello in hellos for device in hello.devices}

    def _importance(self, trials: Sequence[TrialPage], searched: Sequence[str]) -> Importance:
        known = [trial for trial in trials if trial.best is not None]
        params = [{name: value for name, value in trial.params.items() if name in searched} for trial in known]
        return importance_of(params, [trial.best for trial in known if trial.best is not None])

    def _best_so_far(self) -> Curve:
        """Each report that was better than all before it, in the order of time."""
        sign = -1.0 if self._mode == "max" else 1.0
        reports = sorted(
            (t_s, value)
            for course in self._courses.values()
            for (t_s, _), value in zip(course.reports, _values(course, self._metric), strict=True)
            if value is not None
        )
        best = math.inf
        kept: list[tuple[float, float]] = []
        for t_s, value in reports:
            if sign * value < best:
                best = sign * value
                kept.append((t_s, value))
        if kept:
            kept.append((self._elapsed_s, kept[-1][1]))
        times = np.array([t_s for t_s, _ in kept])
        used = sum((course.device_s_at(times) for course in self._courses.values()), np.zeros(len(times)))
        values = plain(each[1] for each in kept)
        return Curve(samples=(), seconds=plain(times.tolist()), device_s=plain(used.tolist()), values=values)


def _values(course: Course, metric: str) -> list[float | None]:
    """A metric of each report, None where it was not finite or not reported."""
    return [entry.metrics.get(metric) for _, entry in course.reports]


def _reported(course: Course, metric: str, num_points: int) -> Curve | None:
    """A metric over the reports of a trial; None where it was never finite."""
    known = [(t_s, entry) for t_s, entry in course.reports if entry.metrics.get(metric) is not None]
    if not known:
        return None
    return step_records.curve_of(
        np.array([float(entry.num_samples) for _, entry in known]),
        np.array([t_s for t_s, _ in known]),
        np.array([float(entry.metrics[metric] or 0.0) for _, entry in known]),
        course,
        num_points,
    )


def _newest(changes: Sequence[Change], room: int) -> tuple[Change, ...]:
    return tuple(changes[-room:])


def _param(value: object) -> object:
    """A value that JSON has; a number that is not finite as a word."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
