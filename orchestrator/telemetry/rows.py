"""The newest step records of a rank, as they came: in chunks, at most so many. Used by `window`."""

from __future__ import annotations

from collections import deque

import numpy as np

from orchestrator.telemetry.record import STEP_DTYPE, StepArray
from orchestrator.telemetry.validation import Floats


class Rows:
    """The newest accepted rows, in chunks, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[StepArray] = deque()
        self._num_rows = 0

    def add(self, rows: StepArray) -> None:
        """Append a chunk and forget the oldest rows beyond the limit."""
        self._chunks.append(rows[-self._limit :])
        self._num_rows += len(self._chunks[-1])
        while self._num_rows > self._limit:
            excess = self._num_rows - self._limit
            oldest = self._chunks.popleft()
            if len(oldest) > excess:
                self._chunks.appendleft(oldest[excess:])
            self._num_rows -= min(excess, len(oldest))

    def trim(self, ended_after_s: float) -> None:
        """Forget chunks that ended before that time."""
        while self._chunks and float(end_s(self._chunks[0][-1:])[0]) < ended_after_s:
            self._num_rows -= len(self._chunks.popleft())

    def joined(self) -> StepArray:
        """All rows, oldest first."""
        # `np.concatenate` compares the types field by field, which takes longer than the copy.
        rows, end = np.empty(self._num_rows, dtype=STEP_DTYPE), 0
        for chunk in self._chunks:
            rows[end : end + len(chunk)] = chunk
            end += len(chunk)
        return rows

    def clear(self) -> None:
        """Forget all rows."""
        self._chunks.clear()
        self._num_rows = 0


def end_s(rows: StepArray) -> Floats:
    """When each step ended, seconds."""
    ends: Floats = rows["start_s"] + rows["step_s"]
    return ends
