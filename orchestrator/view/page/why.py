"""Why a trial is not running: what the journal says, and how one that the search stopped stood beside the others.

Reads events and courses; knows nothing of pages. Called by `gather`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from orchestrator.control.events import RunBegan
from orchestrator.control.journal import History
from orchestrator.control.requested import RequestTaken
from orchestrator.view.page.course import Course
from orchestrator.view.text import clean, mapping, show_number


class Reasons:
    """Says of each trial of a run why it is not running."""

    def __init__(self, history: History, courses: Mapping[str, Course], metric: str, mode: str) -> None:
        began = next(history.of(RunBegan), None)
        rule = mapping(mapping({} if began is None else began.spec).get("stop_rule"))
        self._who = clean(rule.get("name") or "the search")
        self._metric, self._sign = metric, -1.0 if mode == "max" else 1.0
        self._courses = courses
        self._asked = {str(asked.trial_id): asked.by for asked in history.of(RequestTaken) if asked.command == "stop"}
        self._at_report: dict[int, list[float]] = {}
        for course in courses.values():
            for _, entry in course.reports:
                value = entry.metrics.get(metric)
                if value is not None:
                    self._at_report.setdefault(entry.index, []).append(self._sign * value)
        for values in self._at_report.values():
            values.sort()

    def of(self, trial_id: str, state: str, error: str) -> str:
        """One sentence; empty for a trial that runs or is done."""
        if state in {"done", "running"}:
            return ""
        course = self._courses.get(trial_id)
        if error or course is None or course.why:
            return clean(error or ("" if course is None else course.why))
        if state != "stopped":
            return ""
        if trial_id in self._asked:
            return f"stopped on request of {clean(self._asked[trial_id])}"
        return self._stopped(course)

    def _stopped(self, course: Course) -> str:
        """What the search saw when it stopped a trial."""
        if not course.reports:
            return f"stopped by {self._who} before its first report"
        entry = course.reports[-1][1]
        value, report = entry.metrics.get(self._metric), f"report {entry.index + 1}"
        if value is None:
            return f"stopped by {self._who} after {report}, whose {clean(self._metric)} was no number"
        values = self._at_report[entry.index]
        place = f"place {1 + bisect_left(values, self._sign * value)} of {len(values)}"
        return f"stopped by {self._who}: {place} at {report}, {clean(self._metric)} {show_number(value)}"
