"""What step records add to a trial's page: the curve of its loss, how its steps were executed, and its memory.

Reads the table of steps of rank 0; knows nothing of the journal or of pages. Called by `gather`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.telemetry.record import FLAG_SKIPPED, MODE_FLAGS, mode_of
from orchestrator.view.page.course import Course
from orchestrator.view.page.thinning import Floats, bucket_maxima, plain, rounded, thinned
from orchestrator.view.page.values import Curve, Series, Span

_COLUMNS = ("attempt", "seq", "cursor", "num_samples", "flags", "start_s", "step_s", "loss", "memory_bytes")
_MAX_SPANS = 200
Columns = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsPage:
    """What the records of a trial say; the same fields as in `values.TrialPage`."""

    loss: Curve | None
    execution: tuple[Span, ...]
    memory: Series


NOTHING = StepsPage(loss=None, execution=(), memory=Series(t_s=(), values=()))


def by_trial(steps: pa.Table) -> Iterator[tuple[str, Columns]]:
    """The records of rank 0 of each trial, in the order in which they were made."""
    steps = steps.filter(pc.equal(steps["rank"], 0))
    if not steps.num_rows:
        return
    names = pc.cast(steps["trial_id"], pa.utf8()).combine_chunks().dictionary_encode()
    trial = names.indices.to_numpy(zero_copy_only=False)
    columns: Columns = {name: steps[name].to_numpy() for name in _COLUMNS}
    order = np.lexsort((columns["seq"], columns["attempt"], trial))
    trial = trial[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(trial)) + 1, [len(trial)]])
    for start, end in pairwise(starts.tolist()):
        rows = order[start:end]
        yield names.dictionary[int(trial[start])].as_py(), {name: column[rows] for name, column in columns.items()}


def page_of(columns: Columns, course: Course, num_points: int) -> StepsPage:
    """What the records of one trial say, in at most `num_points` points for each curve."""
    known = [attempt in course.offsets for attempt in columns["attempt"].tolist()]
    columns = {name: column[np.array(known)] for name, column in columns.items()}
    if not len(columns["seq"]):
        return NOTHING
    offsets = np.array([course.offsets[attempt] for attempt in columns["attempt"].tolist()])
    start_s = columns["start_s"].astype(np.float64) + offsets
    end_s = start_s + columns["step_s"].astype(np.float64)
    memory = columns["memory_bytes"].astype(np.float64)
    t_s, peaks = bucket_maxima(start_s, np.where(memory > 0, memory, np.nan), max(10, num_points // 4))
    return StepsPage(
        loss=_loss(columns, end_s, course, num_points),
        execution=_execution(columns["flags"].astype(np.int64), start_s, end_s),
        memory=Series(t_s=plain(t_s.tolist()), values=plain(peaks.tolist())),
    )


def _loss(columns: Columns, end_s: Floats, course: Course, num_points: int) -> Curve | None:
    """The training loss of the course that survives: steps that a fault or a rollback undid are left out."""
    cursor, loss = columns["cursor"].astype(np.int64), columns["loss"].astype(np.float64)
    later = np.append(np.minimum.accumulate(cursor[::-1])[::-1][1:], np.iinfo(np.int64).max)
    flags = columns["flags"].astype(np.int64)
    keep = (cursor < later) & np.isfinite(loss) & (flags & FLAG_SKIPPED == 0)
    if not keep.any():
        return None
    samples = (cursor + columns["num_samples"].astype(np.int64)).astype(np.float64)[keep]
    return curve_of(samples, end_s[keep], loss[keep], course, num_points)


def curve_of(samples: Floats, t_s: Floats, values: Floats, course: Course, num_points: int) -> Curve:
    """Values of a trial as a curve of at most `num_points` points."""
    kept = thinned(samples, values, num_points)
    t_s = t_s[kept]
    return Curve(
        samples=plain(samples[kept].tolist()),
        seconds=plain(course.seconds_at(t_s).tolist()),
        device_s=plain(course.device_s_at(t_s).tolist()),
        values=plain(values[kept].tolist()),
    )


def _execution(flags: npt.NDArray[np.int64], start_s: Floats, end_s: Floats) -> tuple[Span, ...]:
    """How steps were executed, one span for each stretch without a change; short ones join the one before them."""
    mode = flags & MODE_FLAGS
    starts = np.concatenate([[0], np.flatnonzero(np.diff(mode)) + 1])
    ends = np.append(starts[1:], len(mode)) - 1
    least_s = (end_s[-1] - start_s[0]) / _MAX_SPANS
    spans: list[Span] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        word = mode_of(int(mode[start]))
        is_short = len(starts) > _MAX_SPANS and end_s[end] - start_s[start] < least_s
        if spans and (is_short or spans[-1].word == word):
            word, begin = spans[-1].word, spans.pop().start_s
        else:
            begin = float(start_s[start])
        spans.append(Span(start_s=rounded(begin) or 0.0, end_s=rounded(float(end_s[end])) or 0.0, word=word))
    return tuple(spans)
