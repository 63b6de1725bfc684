from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.telemetry.record import STEP_DTYPE, TIERS
from orchestrator.telemetry.tables import SCHEMAS, StepRows, TableKind, checksum, row_batch, step_batch
from tests.run_directory import records

NAMES = st.sampled_from(["", "a", "b", "a longer name"])
VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.utf8(): st.text(max_size=12),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(),
    pa.map_(pa.utf8(), pa.float64()): st.dictionaries(st.text(max_size=6), st.none() | st.floats(), max_size=4),
}


@st.composite
def step_batches(draw: st.DrawFn) -> pa.RecordBatch:
    """Records of any bytes; tiers are now and then of a code that there is."""
    parts = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=3)):
        num = draw(st.integers(1, 12))
        size = num * STEP_DTYPE.itemsize
        part = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), STEP_DTYPE).copy()
        part["tier"] = draw(st.lists(st.integers(-1, len(TIERS)), min_size=num, max_size=num))
        parts.append(StepRows(trial_id=name, attempt=0, rank=0, records=part))
    return step_batch(parts)


def row_batches(kind: TableKind) -> st.SearchStrategy[pa.RecordBatch]:
    columns = {field.name: st.none() | VALUES[field.type] for field in SCHEMAS[kind]}
    rows = st.fixed_dictionaries({}, optional=columns)
    return st.lists(rows, min_size=1, max_size=12).map(lambda rows: row_batch(kind, rows))


def batches(kind: TableKind) -> st.SearchStrategy[pa.RecordBatch]:
    return step_batches() if kind is TableKind.STEPS else row_batches(kind)


def written_and_read(parts: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, parts[0].schema) as stream:
        for part in parts:
            stream.write_batch(part)
    return list(pa.ipc.open_stream(sink.getvalue()))


@pytest.mark.parametrize("kind", TableKind)
@settings(deadline=None)
@given(data=st.data())
def test_a_checksum_is_the_same_before_writing_and_after_reading(kind: TableKind, data: st.DataObject) -> None:
    first, second = data.draw(batches(kind)), data.draw(batches(kind))
    start = data.draw(st.integers(0, first.num_rows - 1))
    part = first.slice(start, data.draw(st.integers(1, first.num_rows - start)))
    sent = [first, part, second, first]  # dictionaries come, go and come back
    assert [checksum(batch) for batch in written_and_read(sent)] == [checksum(batch) for batch in sent]


@pytest.mark.parametrize("kind", TableKind)
@settings(deadline=None)
@given(data=st.data())
def test_batches_of_other_rows_have_other_checksums(kind: TableKind, data: st.DataObject) -> None:
    one, other = data.draw(batches(kind)), data.draw(batches(kind))
    is_same = repr(one.to_pylist()) == repr(other.to_pylist())  # as text, where NaN equals itself
    assert is_same or checksum(one) != checksum(other)


def test_a_checksum_covers_names_nulls_and_the_number_of_rows() -> None:
    def steps(trial_id: str, tier: int = 0) -> pa.RecordBatch:
        part = records(3)
        part["tier"] = tier
        return step_batch([StepRows(trial_id=trial_id, attempt=0, rank=0, records=part)])

    def results(**row: object) -> pa.RecordBatch:
        return row_batch(TableKind.RESULTS, [row])

    known = [
        *(steps("a"), steps("b"), steps("a").slice(0, 2), steps("a", tier=1), steps("a", tier=-1)),
        *(results(), results(step=0), results(trial_id=""), results(trial_id="a"), results(metrics={})),
        *(results(metrics={"x": None}), results(metrics={"x": 0.0}), results(metrics={"y": 0.0})),
    ]
    assert len({checksum(batch) for batch in known}) == len(known)
