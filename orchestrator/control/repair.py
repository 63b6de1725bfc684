"""A journal with damaged lines made whole again, as far as the other lines and the tables of the run tell.

Damaged lines are left out, and of those behind them what cannot have happened without them; reports that were lost are
taken from the table of results. What the damaged journal held is kept beside it, and checkpoints are not touched.
Called by the command `repair`, on a run that nobody runs.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.control.effects import Refused
from orchestrator.control.entries import decode
from orchestrator.control.events import Event, Reported, RunBegan
from orchestrator.control.journal import FILE_NAME, line_of, parse, sealed, segments
from orchestrator.control.snapshots import FILE_NAME as SNAPSHOT_NAME
from orchestrator.control.spec import RunSpec
from orchestrator.control.transition import apply
from orchestrator.control.world import World
from orchestrator.errors import ConfigError, JournalError
from orchestrator.names import write_atomically
from orchestrator.policies.plan import TrialId
from orchestrator.telemetry.store import read_table
from orchestrator.telemetry.tables import TableKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What was done to a journal.

    Attributes:
        num_lines: lines that it had, a torn last one not counted.
        num_kept: entries that it has now.
        damage: one sentence per line that could not be read.
        impossible: one sentence per entry that cannot have happened without them.
        num_restored: reports that were taken from the table of results.
        kept_as: the directory where the damaged journal is now; None where nothing was wrong.
    """

    num_lines: int
    num_kept: int
    damage: tuple[str, ...] = ()
    impossible: tuple[str, ...] = ()
    num_restored: int = 0
    kept_as: Path | None = None


def repair(run_dir: Path) -> Repair:
    """Make the journal of a run whole.

    Raises:
        ConfigError: there is no journal.
        JournalError: its first line, which says what the run is, cannot be read, or a newer version wrote it.
    """
    files = [path for path in segments(run_dir) if path.exists()]
    if not files:
        raise ConfigError(f"{run_dir} has no {FILE_NAME} to repair")
    lines = [line for path in files for line in path.read_bytes().split(b"\n")[:-1]]
    damage: list[str] = []
    events = list(_readable(lines, damage))
    if not events or not isinstance(events[0], RunBegan):
        why = damage[0] if damage else "it is empty"
        raise JournalError(
            f"{files[0]} cannot be repaired: its first line, which says what the run is, is not there ({why}); begin a"
            " new run under another name, the checkpoints of this one stay where they are"
        )
    kept = _Kept(events[0], run_dir)
    for event in events:
        kept.take(event)
    found = Repair(
        num_lines=len(lines),
        num_kept=len(kept.events),
        damage=tuple(damage),
        impossible=tuple(kept.impossible),
        num_restored=kept.num_restored,
    )
    if not damage and [event.seq for event in events] == list(range(1, len(events) + 1)):
        return found
    names = (run_dir / f"journal.damaged-{number}" for number in itertools.count(1))
    aside = next(each for each in names if not each.exists())
    aside.mkdir()
    for path in files:
        shutil.copy2(path, aside)
    numbered = (replace(event, seq=number) for number, event in enumerate(kept.events, start=1))
    write_atomically(run_dir / FILE_NAME, b"".join(sealed(line_of(event)) for event in numbered).decode())
    for path in [*files[:-1], run_dir / SNAPSHOT_NAME]:
        path.unlink(missing_ok=True)
    return replace(found, kept_as=aside)


def _readable(lines: list[bytes], damage: list[str]) -> Iterator[Event]:
    for number, line in enumerate(lines, start=1):
        try:
            yield decode(parse(line))
        except (KeyError, TypeError, ValueError) as error:
            damage.append(f"line {number}: {type(error).__name__} {str(error)[:100]}")


class _Kept:
    """The entries that are kept, each applied to the world that those before it left."""

    def __init__(self, head: RunBegan, run_dir: Path) -> None:
        spec = RunSpec.from_jsonable(dict(head.spec))
        self._world = World((spec,))
        self._run = self._world.runs[spec.run_id]
        rows = read_table(run_dir / "telemetry", TableKind.RESULTS).table.to_pylist()
        self._rows: dict[tuple[str, int], dict[str, Any]] = {(row["trial_id"], row["index"]): row for row in rows}
        self.events: list[Event] = []
        self.impossible: list[str] = []
        self.num_restored = 0

    def take(self, event: Event) -> None:
        """Keep an entry if it can have happened, and before it the reports that are missing."""
        event = replace(event, run_id=self._run.spec.run_id)
        trial = self._run.trials.get(event.trial_id) if isinstance(event, Reported) else None
        if trial is not None and isinstance(event, Reported):
            for index in range(len(trial.reports), event.index):
                missing = self._report(event, index)
                if missing is not None:
                    self._apply(missing)
                    self.num_restored += 1
        refused = self._apply(event)
        if refused is not None:
            self.impossible.append(f"entry {event.seq}: {refused.reason}")

    def _apply(self, event: Event) -> Refused | None:
        found = apply(self._world, event)
        if isinstance(found, Refused):
            return found
        self.events.append(event)
        return None

    def _report(self, after: Reported, index: int) -> Reported | None:
        """A report that the table of results has and the journal lost."""
        row = self._rows.get((after.trial_id, index))
        if row is None:
            return None
        return Reported(
            run_id=after.run_id,
            t_s=after.t_s,
            wall_s=after.wall_s,
            trial_id=TrialId(after.trial_id),
            index=index,
            step=row["step"],
            num_samples=row["num_samples"],
            metrics=dict(row["metrics"] or ()),
            checkpoint=row["checkpoint"],
        )
