"""The columns of the telemetry tables, and how rows become Arrow batches.

Knows nothing of files. Used by `telemetry.store`, which keeps the tables, and by tests that look at them. A column is
only ever added; readers fill what an older file lacks with nulls and refuse a file of a newer schema.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa

from orchestrator.errors import TelemetryError
from orchestrator.telemetry.record import SCHEMA_VERSION, STEP_DTYPE, TIERS, StepArray, tier_of

_SCHEMA_KEY = b"orchestrator.schema"
_NAMES = pa.dictionary(pa.int32(), pa.utf8())
_TIERS = pa.dictionary(pa.int8(), pa.utf8())
_MAX_TIERS = 127  # of one batch: what an int8 can number; no honest trial sees a dozen


class TableKind(StrEnum):
    """The three tables of a run."""

    STEPS = "steps"
    DEVICES = "devices"
    RESULTS = "results"


KEYS: dict[TableKind, tuple[str, ...]] = {
    TableKind.STEPS: ("trial_id", "attempt", "rank", "seq"),
    TableKind.DEVICES: ("device_id", "t_s"),
    # A trial that takes up the state of another goes back to fewer reports, and makes some a second time.
    TableKind.RESULTS: ("trial_id", "attempt", "index"),
}
"""What identifies a row; a second row of the same key is a resend and is dropped on reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Records of one rank as they arrived."""

    trial_id: str
    attempt: int
    rank: int
    records: StepArray


def _schema(columns: Iterable[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(list(columns), metadata={_SCHEMA_KEY: str(SCHEMA_VERSION).encode()})


SCHEMAS: dict[TableKind, pa.Schema] = {
    TableKind.STEPS: _schema(
        [
            ("trial_id", _NAMES),
            ("attempt", pa.int32()),
            ("rank", pa.int32()),
            *(
                (name, _TIERS if name == "tier" else pa.from_numpy_dtype(STEP_DTYPE[name]))
                for name in STEP_DTYPE.names or ()
            ),
        ]
    ),
    TableKind.DEVICES: _schema(
        [
            ("device_id", pa.utf8()),
            ("node_id", pa.utf8()),
            ("kind", pa.utf8()),
            ("units", pa.int32()),
            ("t_s", pa.float64()),
            ("wall_s", pa.float64()),
            ("granted_share", pa.float64()),
            ("utilisation_ratio", pa.float64()),
            ("memory_used_bytes", pa.int64()),
            ("memory_total_bytes", pa.int64()),
            ("power_w", pa.float64()),
            ("temperature_c", pa.float64()),
            ("sm_active_ratio", pa.float64()),
            ("tensor_active_ratio", pa.float64()),
            ("dram_active_ratio", pa.float64()),
            ("problem", pa.utf8()),
        ]
    ),
    TableKind.RESULTS: _schema(
        [
            ("trial_id", pa.utf8()),
            ("attempt", pa.int32()),
            ("index", pa.int32()),
            ("t_s", pa.float64()),
            ("wall_s", pa.float64()),
            ("step", pa.int64()),
            ("num_samples", pa.int64()),
            ("metrics", pa.map_(pa.utf8(), pa.float64())),
            ("checkpoint", pa.utf8()),
        ]
    ),
}


def step_batch(rows: Sequence[StepRows]) -> pa.RecordBatch:
    """One Arrow batch of records of any number of trials and ranks, in the order given."""
    records = np.concatenate([part.records for part in rows])
    lengths = [len(part.records) for part in rows]
    names = sorted({part.trial_id for part in rows})
    number = {name: index for index, name in enumerate(names)}
    columns = [
        pa.DictionaryArray.from_arrays(
            pa.array(np.repeat(np.array([number[part.trial_id] for part in rows], dtype=np.int32), lengths)),
            pa.array(names, pa.utf8()),
        ),
        pa.array(np.repeat(np.array([part.attempt for part in rows], dtype=np.int32), lengths)),
        pa.array(np.repeat(np.array([part.rank for part in rows], dtype=np.int32), lengths)),
    ]
    for name in STEP_DTYPE.names or ():
        values = np.ascontiguousarray(records[name])
        columns.append(_tier_column(values) if name == "tier" else pa.array(values))
    return pa.record_batch(columns, schema=SCHEMAS[TableKind.STEPS])


def row_batch(kind: TableKind, rows: Sequence[Mapping[str, object]]) -> pa.RecordBatch:
    """One Arrow batch of device or result rows; what a row lacks is null.

    Raises:
        TelemetryError: a value is not of its column's type.
    """
    try:
        return pa.RecordBatch.from_pylist([_plain(row) for row in rows], schema=SCHEMAS[kind])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise TelemetryError(f"a row of the table {kind} does not fit its columns: {error}") from error


def checksum(batch: pa.RecordBatch) -> bytes:
    """CRC-32 of the rows of a batch in hex, the same before it is written and after it was read.

    It is taken of the body of Arrow's own message, where slices begin at zero and a null mask without a null is gone,
    and of what one has to know to read that body: names, types, the number of rows, and which columns have a mask.
    """
    form: list[object] = [batch.num_rows, batch.schema.names, [str(kind) for kind in batch.schema.types]]
    for column in batch.columns:
        form.append(column.null_count)
        if pa.types.is_dictionary(column.type):
            form.append(column.dictionary.to_pylist())  # of these columns the body has the numbers of names alone
    text = json.dumps(form, default=repr)  # a damaged head may make bytes of names
    body = pa.ipc.read_message(batch.serialize()).body
    return b"%08x" % zlib.crc32(body, zlib.crc32(text.encode()))


def check_columns(kind: TableKind, rows: Sequence[Mapping[str, object]]) -> None:
    """Refuse rows with columns the table does not have.

    Raises:
        TelemetryError: with the names.
    """
    known = set(SCHEMAS[kind].names)
    unknown = sorted({name for row in rows for name in row} - known)
    if unknown:
        raise TelemetryError(
            f"the table {kind} has no column {', '.join(unknown)}; allowed: {', '.join(sorted(known))}"
        )


def check_version(schema: pa.Schema, origin: str) -> None:
    """Refuse a file that says it is of a newer schema, or of none.

    Raises:
        TelemetryError: with the version and what is allowed.
    """
    text = (schema.metadata or {}).get(_SCHEMA_KEY, b"none")
    if not text.isdigit() or not 1 <= int(text) <= SCHEMA_VERSION:
        raise TelemetryError(
            f"{origin} has telemetry schema {text.decode('ascii', 'replace')}; allowed: 1..{SCHEMA_VERSION};"
            " read it with the version of the orchestrator that wrote it"
        )


def names_version(schema: pa.Schema) -> bool:
    """Whether a file says of which schema it is; a head that does not is torn, or not ours."""
    return bool((schema.metadata or {}).get(_SCHEMA_KEY, b"").isdigit())


def conform(table: pa.Table, kind: TableKind) -> pa.Table:
    """Give `table` the columns and types of today's schema; columns an older file lacks become nulls.

    Raises:
        TelemetryError: a column cannot be read as its type.
    """
    schema = SCHEMAS[kind]
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        try:
            columns.append(table[field.name].cast(field.type))
        except pa.ArrowException as error:
            raise TelemetryError(f"column {field.name} of the table {kind} cannot be read: {error}") from error
    return pa.table(columns, schema=schema)


def _tier_column(codes: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> pa.Array:
    """Tier names of wire codes; a code that names no tier becomes null."""
    present = {int(code): tier for code in np.unique(codes) if (tier := tier_of(int(code))) is not None}
    # The plain tiers always stand first, in wire order, so that most batches have one and the same dictionary.
    names = [*TIERS, *(tier for tier in present.values() if tier not in TIERS)][:_MAX_TIERS]
    indices = np.zeros(len(codes), dtype=np.int8)
    known = {code: names.index(tier) for code, tier in present.items() if tier in names}
    for code, index in known.items():
        indices[codes == code] = index
    return pa.DictionaryArray.from_arrays(
        pa.array(indices, mask=~np.isin(codes, list(known))), pa.array([tier.value for tier in names], pa.utf8())
    )


def _plain(row: Mapping[str, object]) -> dict[str, object]:
    """A mapping becomes the list of pairs Arrow's map type wants."""
    return {name: list(value.items()) if isinstance(value, Mapping) else value for name, value in row.items()}
