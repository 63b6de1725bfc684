"""The telemetry of a run on disk: Arrow segments while it goes on, one Parquet file per segment afterwards.

A segment is an Arrow IPC stream that only its writer appends to; whoever reads it at any instant gets every whole batch
and a note about a torn tail. A batch whose checksum differs is torn too: blocks that a crash kept from the disk read as
zeros, and Arrow takes zeros for numbers. A new writer (a restarted actor) begins new segments and leaves the old ones
alone. Compaction renames a complete Parquet file into place before its segment is removed, so that every row is in at
least one of the two; a row that is in both is a duplicate, and duplicates are dropped on reading.

Knows nothing of plans or trials. Written by the controller's event loop, read by `telemetry.load` and `view.verify`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.errors import TelemetryError
from orchestrator.room import words
from orchestrator.telemetry.record import STEP_DTYPE, StepArray
from orchestrator.telemetry.segment import CHECKSUM, PARQUET, SEGMENT, Segment, files_of
from orchestrator.telemetry.tables import (
    KEYS,
    SCHEMAS,
    StepRows,
    TableKind,
    check_columns,
    check_version,
    checksum,
    conform,
    names_version,
    row_batch,
    step_batch,
)

logger = logging.getLogger(__name__)

MAX_BUFFERED_ROWS = 1_000_000
"""Step rows kept while the disk takes none (about 140 MB); beyond it the oldest are dropped and counted."""

_FLUSH_ROWS = 1 << 16
_ROW_GROUP_ROWS = 1 << 18


class TelemetryWriter:
    """Appends to the tables of one run. Not thread-safe: its owner is one event loop.

    A full disk never stops the caller: rows wait in memory, bounded, and go into a new segment when there is room.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._segments = {kind: Segment(directory, kind) for kind in TableKind}
        self._steps: deque[StepRows] = deque()
        self._num_steps = 0
        self._rows: dict[TableKind, list[Mapping[str, object]]] = {TableKind.DEVICES: [], TableKind.RESULTS: []}
        self._num_dropped = 0
        self._is_failing = False

    @property
    def num_rows_dropped(self) -> int:
        """Step rows given up because the disk took none for too long."""
        return self._num_dropped

    @property
    def alarm(self) -> str | None:
        """Why rows wait in memory; None where none do."""
        if not self._is_failing:
            return None
        num_rows = self._num_steps + sum(map(len, self._rows.values()))
        return f"{num_rows} rows of telemetry wait: {words(self._directory, self._num_steps * STEP_DTYPE.itemsize)}"

    def append_steps(self, trial_id: str, attempt: int, rank: int, records: StepArray) -> None:
        """Take records of one rank, dtype `STEP_DTYPE`. They are on disk after the next `flush`.

        Raises:
            TelemetryError: the records have another dtype.
        """
        if records.dtype != STEP_DTYPE:
            raise TelemetryError(f"records of {trial_id} have dtype {records.dtype}; allowed: STEP_DTYPE")
        if not len(records):
            return
        kept = records.copy() if records.flags.writeable else records
        self._steps.append(StepRows(trial_id=trial_id, attempt=attempt, rank=rank, records=kept))
        self._num_steps += len(kept)
        if self._num_steps >= _FLUSH_ROWS and not self._is_failing:
            self.flush()
        while self._num_steps > MAX_BUFFERED_ROWS:
            oldest = self._steps.popleft()
            self._num_steps -= len(oldest.records)
            self._num_dropped += len(oldest.records)

    def append_devices(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Take one row per device; columns as in `tables.SCHEMAS`, missing ones become null.

        Raises:
            TelemetryError: a row has a column the table lacks, or a value of another type.
        """
        self._append(TableKind.DEVICES, rows)

    def append_results(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Take reports of trials; `metrics` is a mapping of names to numbers or None.

        Raises:
            TelemetryError: a row has a column the table lacks, or a value of another type.
        """
        self._append(TableKind.RESULTS, rows)

    def flush(self) -> bool:
        """Hand everything taken so far to the operating system; False when some of it has to wait for disk space."""
        done = [self._flush_steps(), *(self._flush_rows(kind) for kind in self._rows)]
        was_failing, self._is_failing = self._is_failing, not all(done)
        if self._is_failing and not was_failing:
            logger.warning("telemetry.waiting directory=%s: the disk takes no rows; they are kept", self._directory)
        elif was_failing and not self._is_failing:
            logger.warning("telemetry.resumed directory=%s dropped=%d", self._directory, self._num_dropped)
        return not self._is_failing

    def close(self) -> None:
        """Flush, end the segments and compact every segment of the directory to Parquet.

        Raises:
            TelemetryError: rows could not be written or a segment could not be compacted; all segments are still there.
        """
        is_flushed = self.flush()
        num_waiting = self._num_steps
        for segment in self._segments.values():
            segment.close()
        if not is_flushed:
            raise TelemetryError(
                f"telemetry could not be written to {self._directory} ({num_waiting} step rows lost);"
                " what was written before can be read; free some disk space before the next run"
            )
        compact(self._directory)

    def _append(self, kind: TableKind, rows: Sequence[Mapping[str, object]]) -> None:
        check_columns(kind, rows)
        row_batch(kind, rows)  # a value that does not fit is the caller's to hear of, not that of the next flush
        self._rows[kind].extend(rows)

    def _flush_steps(self) -> bool:
        if not self._steps:
            return True
        if not self._write(TableKind.STEPS, step_batch(self._steps)):
            return False
        self._steps.clear()
        self._num_steps = 0
        return True

    def _flush_rows(self, kind: TableKind) -> bool:
        rows = self._rows[kind]
        if not rows:
            return True
        if not self._write(kind, row_batch(kind, rows)):
            del rows[:-MAX_BUFFERED_ROWS]
            return False
        rows.clear()
        return True

    def _write(self, kind: TableKind, batch: pa.RecordBatch) -> bool:
        try:
            self._segments[kind].write(batch)
        except OSError as error:
            logger.debug("telemetry.unwritten table=%s: %s", kind, error)
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRead:
    """What could be read of one table.

    Attributes:
        table: its rows, sorted by what identifies them, without duplicates.
        num_duplicates: rows dropped because they were there already.
        notes: what could not be read, one sentence each.
    """

    table: pa.Table
    num_duplicates: int
    notes: tuple[str, ...]


def read_table(directory: Path, kind: TableKind) -> TableRead:
    """Read a table while it is being written, after a crash or after the end.

    Raises:
        TelemetryError: a file was written by a newer version.
    """
    notes: list[str] = []
    parts: list[pa.Table] = []
    # Segments first: one that is compacted meanwhile is then found as Parquet; in the other order it could be missed.
    for path in files_of(directory, kind, SEGMENT):
        with suppress(FileNotFoundError):
            batches = list(_batches(path, notes))
            if batches:
                parts.append(conform(pa.Table.from_batches(batches), kind))
    for path in files_of(directory, kind, PARQUET):
        part = _read_parquet(path, notes)
        if part is not None:
            parts.append(conform(part, kind))
    if not parts:
        return TableRead(table=SCHEMAS[kind].empty_table(), num_duplicates=0, notes=tuple(notes))
    table = pa.concat_tables(parts).unify_dictionaries()
    rows = _first_rows(table, KEYS[kind])
    kept = table if rows is None else table.take(pa.array(rows))
    return TableRead(table=kept.combine_chunks(), num_duplicates=table.num_rows - kept.num_rows, notes=tuple(notes))


def compact(directory: Path) -> None:
    """Turn every segment into a Parquet file of its own and remove it.

    Raises:
        TelemetryError: a Parquet file could not be written; its segment is still there.
    """
    for kind in TableKind:
        for path in files_of(directory, kind, SEGMENT):
            try:
                _compact_one(path, kind)
            except TelemetryError as error:  # of a newer version: not ours to touch
                logger.warning("telemetry.kept %s", error)
            except OSError as error:
                raise TelemetryError(f"cannot compact {path}: {error}; the segment was kept") from error


def _compact_one(path: Path, kind: TableKind) -> None:
    target = path.with_suffix(PARQUET)
    if target.exists():  # whole, or it would not have that name; the segment may have come back torn after a crash
        return _remove(path)
    partial = path.with_suffix(".partial")
    notes: list[str] = []
    num_rows = 0
    try:
        with pq.ParquetWriter(partial, SCHEMAS[kind], compression="zstd", write_page_checksum=True) as writer:
            for part in _grouped(_batches(path, notes, is_last_chance=True)):
                writer.write_table(conform(part, kind))
                num_rows += part.num_rows
        if num_rows:
            _sync(partial)
            partial.replace(target)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    for note in notes:
        logger.warning("telemetry.torn %s", note)
    _remove(path)


def _remove(path: Path) -> None:
    path.unlink()
    _sync(path.parent)


def _grouped(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables of about one Parquet row group each."""
    pending: list[pa.RecordBatch] = []
    num_rows = 0
    for batch in batches:
        pending.append(batch)
        num_rows += batch.num_rows
        if num_rows >= _ROW_GROUP_ROWS:
            yield pa.Table.from_batches(pending).unify_dictionaries()
            pending, num_rows = [], 0
    if pending:
        yield pa.Table.from_batches(pending).unify_dictionaries()


def _batches(path: Path, notes: list[str], *, is_last_chance: bool = False) -> Iterator[pa.RecordBatch]:
    """Whole batches of a segment, as they were written; what is torn is left out with a note.

    Raises:
        OSError: with `is_last_chance`, the disk or the memory failed, which says nothing about the file.
    """
    size = path.stat().st_size  # its writer may add to it meanwhile
    if size == 0:
        return
    num_rows, changed_at = 0, []
    with pa.OSFile(str(path), "rb") as file:
        try:
            reader = pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            _reraise(error, is_last_chance)
            notes.append(f"{path.name}: no readable head ({_short(error)})")
            return
        if not names_version(reader.schema):
            notes.append(f"{path.name}: no readable head (it names no version)")
            return
        check_version(reader.schema, str(path))
        is_sealed = CHECKSUM in (reader.schema.metadata or {})
        while True:
            try:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
                is_whole = _is_as_written(batch, dict(metadata or {}), is_sealed)
            except StopIteration:
                if file.tell() < size:  # a head of zeros, which a crash leaves too, is Arrow's mark of the end
                    notes.append(f"{path.name}: torn after {num_rows} rows (there is more behind its end)")
                break
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                _reraise(error, is_last_chance)
                notes.append(f"{path.name}: torn after {num_rows} rows ({_short(error)})")
                break
            if is_whole:
                num_rows += batch.num_rows
                yield batch
            else:
                changed_at.append(num_rows)
    if changed_at:
        words = f"batches that are not as they were written: {len(changed_at)}"
        notes.append(f"{path.name}: torn after {changed_at[0]} rows ({words})")


def _reraise(error: Exception, is_last_chance: bool) -> None:
    """Arrow says of torn files that they are invalid, or raises an OSError of its own, without a number."""
    if is_last_chance and isinstance(error, MemoryError):
        raise OSError(errno.ENOMEM, str(error)) from error
    if is_last_chance and isinstance(error, OSError) and error.errno is not None:
        raise error


def _is_as_written(batch: pa.RecordBatch, metadata: Mapping[bytes, bytes], is_sealed: bool) -> bool:
    """Whether a batch that could be read has the rows it was written with.

    Raises:
        UnicodeDecodeError: the head that names its columns is torn.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return not (is_sealed or CHECKSUM in metadata) or metadata.get(CHECKSUM) == checksum(batch)


def _read_parquet(path: Path, notes: list[str]) -> pa.Table | None:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        notes.append(f"{path.name}: unreadable ({_short(error)})")
        return None
    check_version(table.schema, str(path))
    return table


def _first_rows(table: pa.Table, keys: Sequence[str]) -> npt.NDArray[np.intp] | None:
    """Row numbers of the first row of every key, in key order; None when that is the table as it is."""
    columns = [_codes(table[key]) for key in keys]
    order = np.lexsort(columns[::-1])  # stable: of equal keys the first to arrive stays first
    is_new = np.ones(len(order), dtype=bool)
    if len(order) > 1:
        is_new[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    rows = order[is_new]
    return None if len(rows) == len(order) and bool(np.all(rows[:-1] < rows[1:])) else rows


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """Numbers that sort as the column does, equal where it is equal; null sorts first."""
    if pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
        column = column.cast(pa.utf8())
        names = sorted(name for name in column.unique().to_pylist() if name is not None)
        codes = pc.index_in(column, value_set=pa.array(names, pa.utf8()))
        return np.asarray(pc.fill_null(codes, -1).to_numpy())
    if pa.types.is_floating(column.type):
        return np.asarray(pc.fill_null(column, -np.inf).to_numpy())
    return np.asarray(pc.fill_null(column, 0).to_numpy())


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
