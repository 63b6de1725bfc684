"""What a training loop needs from the outside, without Ray: its newest order, and somewhere to put what happened.

`Outbox` is the sending half: filled by the training thread, emptied by a sender thread. It never blocks training: when
the other side is gone for long, the oldest step records are dropped and counted; everything else is kept.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Protocol

import numpy as np

from orchestrator.control.orders import (
    Ack,
    DialReport,
    Events,
    Fallback,
    Note,
    Outcome,
    OverrideReport,
    Report,
    SlotOrder,
    TierReport,
)
from orchestrator.policies.snapshot import StepModeView
from orchestrator.telemetry.record import STEP_DTYPE, StepArray, pack
from orchestrator.train.pulse import Pulse

_RECORDS_PER_MESSAGE = 2048
_MAX_RECORDS_KEPT = 1 << 18
"""About 40 MB; of steps of 10 ms what a full disk of three quarters of an hour holds back."""


class Link(Protocol):
    """The outside of one rank. `version` is read at every step boundary; everything else only when it changed."""

    version: int
    outbox: Outbox

    def order(self) -> SlotOrder:
        """The newest order (rank 0 only)."""
        ...

    def wait(self, version: int, timeout_s: float) -> None:
        """Return when the version differs from `version`, or after the timeout (rank 0 only)."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Return once everything in the outbox has been taken over there; False after the timeout."""
        ...

    def leave(self, outcome: Outcome) -> Outcome:
        """Meet the other ranks out of band and agree how the trial ended.

        Raises:
            WorkerGroupError: a rank did not come; the worker group must be restarted.
        """
        ...


class Outbox:
    """What a rank has to tell, in order, kept until it was taken over.

    Attributes:
        offset_s: added to every moment, which the rank tells on its own machine's clock, to have it on the run's.
        num_dropped: step records lost because nobody took them.
        pulse: the heartbeat of the trial that runs, which goes with each message; None where none runs.
    """

    def __init__(self) -> None:
        self.offset_s = 0.0
        self.pulse: Pulse | None = None
        self._lock = threading.Lock()
        self._filled = threading.Event()
        self._rows: StepArray = np.zeros(_RECORDS_PER_MESSAGE, dtype=STEP_DTYPE)
        self._num_rows = 0
        self._full: list[StepArray] = []
        self._acks: list[Ack] = []
        self._overrides: list[OverrideReport] = []
        self._reports: list[Report] = []
        self._tiers: list[TierReport] = []
        self._modes: list[StepModeView] = []
        self._dials: list[DialReport] = []
        self._fallbacks: list[Fallback] = []
        self._notes: list[Note] = []
        self._num_taken = 0
        self.num_dropped = 0

    def add_record(self, row: tuple[float, ...]) -> None:
        """Append one step record, fields in the order of `STEP_DTYPE`."""
        with self._lock:
            self._rows[self._num_rows] = row
            self._num_rows += 1
            if self._num_rows == _RECORDS_PER_MESSAGE:
                self._full.append(self._rows)
                self._rows, self._num_rows = np.zeros(_RECORDS_PER_MESSAGE, dtype=STEP_DTYPE), 0
                if len(self._full) * _RECORDS_PER_MESSAGE > _MAX_RECORDS_KEPT:
                    self.num_dropped += len(self._full.pop(0))

    def add_ack(self, ack: Ack) -> None:
        """Append an acknowledgement and ask for it to be sent at once."""
        with self._lock:
            self._acks.append(ack)
        self._filled.set()

    def add_override(self, report: OverrideReport) -> None:
        """Append a protective move and ask for it to be sent at once."""
        with self._lock:
            self._overrides.append(report)
        self._filled.set()

    def add_report(self, report: Report) -> None:
        """Append a report and ask for it to be sent at once."""
        with self._lock:
            self._reports.append(report)
        self._filled.set()

    def add_tiers(self, report: TierReport) -> None:
        """Put what is known of the tiers in place of what was said before; it goes with the next message."""
        with self._lock:
            self._tiers = [report]

    def add_dials(self, report: DialReport) -> None:
        """Put what the training allows in place of what was said before, and ask for it to be sent at once."""
        with self._lock:
            self._dials = [report]
        self._filled.set()

    def add_fallback(self, fallback: Fallback) -> None:
        """Append that a commit was damaged."""
        with self._lock:
            self._fallbacks.append(fallback)

    def add_note(self, note: Note) -> None:
        """Append what is amiss now, or is no more, and ask for it to be sent at once."""
        with self._lock:
            self._notes.append(note)
        self._filled.set()

    def add_mode(self, measured: StepModeView) -> None:
        """Tell which step mode some dials have; it goes with the next message."""
        with self._lock:
            self._modes.append(measured)

    def wait_filled(self, timeout_s: float) -> None:
        """Return when something urgent waits, or after the timeout."""
        if self._filled.wait(timeout_s):
            self._filled.clear()

    def nudge(self) -> None:
        """Make `wait_filled` return now."""
        self._filled.set()

    def take(self) -> Events:
        """Everything that waits, as one message; it is the caller's to deliver, again and again if need be."""
        with self._lock:
            full = [*self._full, self._rows[: self._num_rows]] if self._num_rows else self._full
            for rows in full:
                rows["start_s"] += self.offset_s
            records = [pack(rows) for rows in full]
            events = Events(
                number=self._num_taken,
                acks=tuple(replace(ack, applied_s=ack.applied_s + self.offset_s) for ack in self._acks),
                overrides=tuple(self._overrides),
                reports=tuple(self._reports),
                tiers=tuple(self._tiers),
                modes=tuple(self._modes),
                dials=tuple(self._dials),
                fallbacks=tuple(self._fallbacks),
                notes=tuple(self._notes),
                beat=None if self.pulse is None else self.pulse.view,
                records=tuple(records),
            )
            self._full, self._num_rows = [], 0
            self._acks, self._overrides, self._reports, self._tiers = [], [], [], []
            self._modes, self._dials, self._fallbacks, self._notes = [], [], [], []
            self._num_taken += 1
            return events
