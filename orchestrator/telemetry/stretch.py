"""How fast a trial trained since its dials last turned: what a change brought is told from two such stretches.

Only steps count: not the evaluations, commits and probes between them, which come whatever the dials are, and not the
few steps during which somebody else had the machine. Knows no plan and no clock. Called by `telemetry.window`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.telemetry.record import (
    FLAG_APPLIED,
    FLAG_GRAPH,
    FLAG_SEVERAL,
    FLAG_SKIPPED,
    FLAG_UNSETTLED,
    MODE_FLAGS,
    StepArray,
    num_steps_of,
    step_seconds_of,
)

SETTINGS = ("generation", "cores", "tier", "micro_batch", "grad_accum", "num_workers")
"""Fields of a record that say under which dials a step ran."""
_LONG = 5.0
"""A step of more than so many times the median was interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps that ran under the same dials, the newest of a trial.

    Attributes:
        generation: of the allocation they ran under.
        num_steps: how many count.
        seconds: what they took.
        samples_per_s: samples in them over that.
        is_replayed: whether they were replayed from a graph.
    """

    generation: int
    num_steps: int
    seconds: float
    samples_per_s: float
    is_replayed: bool = False


def ordinary(rows: StepArray) -> StepArray:
    """Rows without skipped steps, the first one after a change, passing step modes and the smaller batch at an end."""
    unusual = (rows["flags"] & (FLAG_SKIPPED | FLAG_APPLIED | FLAG_UNSETTLED)) != 0
    full = rows["micro_batch"].astype(np.int64) * rows["grad_accum"] * rows["num_workers"]
    is_full = (rows["num_samples"] == full) | ((rows["flags"] & FLAG_SEVERAL) != 0)
    found: StepArray = rows[~unusual & is_full]
    return found


def changes_of(rows: StepArray) -> npt.NDArray[np.intp]:
    """Indices of the last row before each change of dials or step mode; `rows` must not be empty."""
    mode = rows["flags"] & MODE_FLAGS
    changes = mode[1:] != mode[:-1]
    for name in SETTINGS:
        changes |= rows[name][1:] != rows[name][:-1]
    return np.flatnonzero(changes)


def newest_stretch(rows: StepArray) -> Stretch | None:
    """What the rows of rank 0, oldest first, say since the last change; None where no step counts."""
    if not len(rows):
        return None
    at = changes_of(rows)
    mine = ordinary(rows[at[-1] + 1 :] if len(at) else rows)
    num_steps, step_s = num_steps_of(mine), step_seconds_of(mine)
    kept = step_s <= _LONG * np.median(step_s) if len(step_s) else np.zeros(0, dtype=np.bool_)
    seconds = float((step_s * num_steps)[kept].sum())
    if seconds <= 0:
        return None
    return Stretch(
        generation=int(rows["generation"][-1]),
        num_steps=int(num_steps[kept].sum()),
        seconds=seconds,
        samples_per_s=float(mine["num_samples"][kept].sum(dtype=np.int64)) / seconds,
        is_replayed=bool(int(mine["flags"][-1]) & FLAG_GRAPH),
    )
