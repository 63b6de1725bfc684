"""The course of each trial, folded from the journal: where it ran, with which dials, what changed and why.

Reads events, in the order in which they happened; knows nothing of files, tables or pages. Called by `gather`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orchestrator.control.events import (
    Acknowledged,
    Event,
    GainRealised,
    Overridden,
    Recovered,
    Reported,
    SlotChanged,
    TrialAssigned,
    TrialContinued,
    TrialEnded,
    TrialPaused,
    TrialRequeued,
    TrialResized,
)
from orchestrator.control.journal import History
from orchestrator.policies.plan import Generation, Settings, TrialId, changed_dials
from orchestrator.view.page.thinning import Floats, rounded
from orchestrator.view.page.values import Change, Dials, Stay
from orchestrator.view.text import clean

Allocations = Mapping[tuple[int, str], Mapping[str, Any]]
"""Generation and trial -> a row of the table of plans."""


@dataclass(slots=True)
class Course:
    """One trial. Times are seconds since the run's first entry.

    Attributes:
        why: the last reason for which it is not running.
        reports: those that count; a trial that goes back makes some a second time.
        offsets: by attempt, what turns the monotonic clock of step records into these seconds.
    """

    stays: list[Stay] = field(default_factory=list)
    dials: list[Dials] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    reports: list[tuple[float, Reported]] = field(default_factory=list)
    offsets: dict[int, float] = field(default_factory=dict)
    settings: Settings | None = None
    why: str = ""

    def seconds_at(self, t_s: Floats) -> Floats:
        """Seconds that it had spent in slots by then."""
        return _integral(t_s, [(stay.start_s, _end(stay), 1.0) for stay in self.stays])

    def device_s_at(self, t_s: Floats) -> Floats:
        """Device-seconds that it had used by then."""
        return _integral(t_s, [(held.start_s, held.end_s, held.share * held.num_workers) for held in self.dials])


def courses_of(history: History, allocations: Allocations, elapsed_s: float) -> dict[str, Course]:
    """The course of each trial of a journal, up to `elapsed_s` where it still goes on."""
    fold = _Fold(history, allocations)
    for entry in history.entries:
        fold.take(entry)
    return fold.finish(elapsed_s)


def grants_of(courses: Mapping[str, Course]) -> dict[str, list[tuple[float, float, float]]]:
    """What trials held of each device: from when, until when, and the share."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for course in courses.values():
        for held in course.dials:
            stay = next((s for s in reversed(course.stays) if s.start_s <= held.start_s <= _end(s)), None)
            for device_id in () if stay is None else stay.devices:
                found.setdefault(device_id, []).append((held.start_s, held.end_s, held.share))
    return found


def granted(pieces: Sequence[tuple[float, float, float]], edges: Floats) -> Floats:
    """Share of a device that was held in all, the mean of each bucket between two edges."""
    if not pieces:
        return np.zeros(len(edges) - 1)
    start, end, share = (np.array(column) for column in zip(*pieces, strict=True))
    t_s, turn = np.concatenate([start, end]), np.concatenate([share, -share])
    order = np.argsort(t_s, kind="stable")
    t_s, level = t_s[order], np.cumsum(turn[order])
    total = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(t_s))])
    means: Floats = np.diff(np.interp(edges, t_s, total)) / np.maximum(np.diff(edges), 1e-9)
    return means


class _Fold:
    """Takes the events of a journal one after the other."""

    def __init__(self, history: History, allocations: Allocations) -> None:
        self._courses: dict[str, Course] = {}
        self._allocations = allocations
        self._realised = {(gain.generation, gain.trial_id): gain.realised for gain in history.of(GainRealised)}
        self._devices: dict[tuple[str, int], tuple[str, ...]] = {}
        self._origin_s = history.entries[0].wall_s if history.entries else 0.0
        self._now_s = 0.0

    def take(self, entry: Event) -> None:
        """What an event changes in a course."""
        before_s, self._now_s = self._now_s, round(entry.wall_s - self._origin_s, 3)
        match entry:
            case SlotChanged(placement=placement) if placement:
                self._devices[entry.slot_id, entry.epoch] = tuple(placement)
            case Recovered(are_workers_gone=True):
                for course in self._courses.values():  # the processes ended at the latest when nothing more was written
                    _close(course, before_s)
            case TrialAssigned():
                self._begin(entry)
            case Acknowledged():
                self._acknowledged(entry)
            case Overridden():
                self._overridden(entry)
            case TrialRequeued() | TrialPaused() | TrialEnded():
                self._left(entry)
            case Reported():
                self._reported(entry)
            case TrialResized() | TrialContinued():
                self._told(entry)
            case _:
                pass

    def finish(self, elapsed_s: float) -> dict[str, Course]:
        """All courses; what is in force holds until the end."""
        for course in self._courses.values():
            if course.settings is not None and course.dials:
                course.dials[-1] = replace(course.dials[-1], end_s=max(elapsed_s, course.dials[-1].start_s))
        return self._courses

    def _of(self, trial_id: TrialId) -> Course:
        return self._courses.setdefault(trial_id, Course())

    def _begin(self, entry: TrialAssigned) -> None:
        course = self._of(entry.trial_id)
        _close(course, self._now_s)
        course.why = ""
        course.offsets[entry.attempt] = entry.wall_s - entry.t_s - self._origin_s
        devices = self._devices.get((entry.slot_id, entry.epoch), ())
        stay = Stay(start_s=self._now_s, end_s=None, attempt=entry.attempt, slot=entry.slot_id, devices=devices)
        course.stays.append(stay)

    def _acknowledged(self, entry: Acknowledged) -> None:
        course = self._of(entry.trial_id)
        key: tuple[Generation, TrialId] = entry.generation, entry.trial_id
        allocation = self._allocations.get((int(entry.generation), entry.trial_id), {})
        has_turned = course.settings is None or bool(changed_dials(course.settings, entry.settings))
        self._note(
            course,
            "dials",
            _turn(course.settings, entry.settings),
            str(allocation.get("reason") or ""),
            dials=tuple(entry.dials),
            step=entry.step,
            generation=int(entry.generation),
            predicted=rounded(allocation.get("predicted_gain")) if has_turned else None,
            realised=rounded(self._realised.get(key)),
        )
        self._turned(course, entry.settings)

    def _overridden(self, entry: Overridden) -> None:
        course = self._of(entry.trial_id)
        self._note(course, "override", _turn(course.settings, entry.settings), entry.reason, step=entry.step)
        self._turned(course, entry.settings)

    def _reported(self, entry: Reported) -> None:
        course = self._of(entry.trial_id)
        while course.reports and course.reports[-1][1].index >= entry.index:
            course.reports.pop()
        course.reports.append((self._now_s, entry))

    def _told(self, entry: TrialResized | TrialContinued) -> None:
        """Something that changes neither where it runs nor its dials."""
        course = self._of(entry.trial_id)
        if isinstance(entry, TrialResized):
            what = f"{entry.num_workers} ranks {entry.stage.replace('_', ' ')}"
            self._note(course, "ranks", what, entry.reason, dials=("workers",))
            return
        course.why = ""
        whose = "its own end" if entry.origin is None else f"report {entry.num_reports} of {entry.origin}"
        self._note(course, "continued", "goes on", f"from {whose}", step=entry.step)

    def _turned(self, course: Course, settings: Settings) -> None:
        """Other dials are in force from now on."""
        if course.dials and course.settings is not None:
            course.dials[-1] = replace(course.dials[-1], end_s=self._now_s)
        course.settings = settings
        course.dials.append(
            Dials(
                start_s=self._now_s,
                end_s=self._now_s,
                share=settings.share,
                micro_batch=settings.micro_batch,
                grad_accum=settings.grad_accum,
                global_batch=settings.global_batch,
                tier=settings.tier.value,
                num_workers=settings.num_workers,
            )
        )

    def _left(self, entry: TrialRequeued | TrialPaused | TrialEnded) -> None:
        course = self._of(entry.trial_id)
        _close(course, self._now_s)
        kind, what = {
            TrialRequeued: ("queued", "waits for a slot"),
            TrialPaused: ("paused", "paused"),
        }.get(type(entry), ("ended", "ended"))
        if isinstance(entry, TrialEnded):
            what = entry.state
        course.why = clean(entry.reason)
        self._note(course, kind, what, entry.reason, step=entry.step)

    def _note(self, course: Course, kind: str, what: str, reason: str, **more: Any) -> None:  # noqa: ANN401
        change = Change(t_s=self._now_s, kind=kind, what=clean(what), reason=clean(reason), **more)
        course.changes.append(change)


def _close(course: Course, t_s: float) -> None:
    """The trial is in no slot any more."""
    if course.stays and course.stays[-1].end_s is None:
        course.stays[-1] = replace(course.stays[-1], end_s=t_s)
    if course.settings is not None:
        course.dials[-1] = replace(course.dials[-1], end_s=max(t_s, course.dials[-1].start_s))
        course.settings = None


def _turn(before: Settings | None, after: Settings) -> str:
    """What turned, in words."""
    words: dict[str, Callable[[Settings], str]] = {
        "share": lambda s: f"{s.share:.3g}",
        "batch": lambda s: f"{s.micro_batch} x {s.grad_accum}",
        "precision": lambda s: s.tier.value,
        "workers": lambda s: str(s.num_workers),
    }
    if before is None:
        return "starts with " + ", ".join(f"{name} {word(after)}" for name, word in words.items() if name != "workers")
    turned = [name for name in changed_dials(before, after) if name in words]
    return ", ".join(f"{name} {words[name](before)} to {words[name](after)}" for name in turned) or "dials kept"


def _end(stay: Stay) -> float:
    return float("inf") if stay.end_s is None else stay.end_s


def _integral(t_s: Floats, pieces: list[tuple[float, float, float]]) -> Floats:
    """Of rates that each hold from a start to an end, in order and without overlap: their integral up to each time."""
    if not pieces:
        return np.zeros(len(t_s))
    start, end, rate = (np.array(column) for column in zip(*pieces, strict=True))
    done = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(end), end - start, 0.0) * rate)])
    place = np.searchsorted(start, t_s, side="right") - 1
    inside = np.clip(t_s - start[place], 0.0, (end - start)[place]) * rate[place]
    return np.where(place < 0, 0.0, done[np.maximum(place, 0)] + inside)
