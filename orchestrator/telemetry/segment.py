"""One Arrow IPC stream of a table, which only its writer appends to, and the names of a table's files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from orchestrator.telemetry.tables import SCHEMAS, TableKind, checksum

SEGMENT, PARQUET = ".arrows", ".parquet"

CHECKSUM = b"orchestrator.crc32"
IN_EVERY_BATCH = b"in every batch"
"""What the head of a segment says of `CHECKSUM`: a tear that takes a batch may take its checksum with it. Segments of
older writers have neither."""


class Segment:
    """The stream one writer appends one table to; opened at the first batch."""

    def __init__(self, directory: Path, kind: TableKind) -> None:
        self._directory, self._kind = directory, kind
        self._file: pa.OSFile | None = None
        self._stream: pa.RecordBatchStreamWriter | None = None
        self._path: Path | None = None
        self._num_batches = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one batch; after a failure the segment is given up and the next batch opens a new one."""
        try:
            stream = self._stream or self._open()
            stream.write_batch(batch, custom_metadata={CHECKSUM: checksum(batch)})
            self._num_batches += 1
        except OSError:
            self._give_up()
            raise

    def close(self) -> None:
        """End the stream with its marker."""
        stream, file = self._stream, self._file
        self._stream = self._file = None
        try:
            if stream is not None:
                stream.close()
        finally:
            if file is not None:
                file.close()

    def _open(self) -> pa.RecordBatchStreamWriter:
        number = 1 + max((_number(path) for path in files_of(self._directory, self._kind)), default=0)
        while True:
            path = self._directory / f"{self._kind}-{number:05d}{SEGMENT}"
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                break
            except FileExistsError:  # another writer took the number; it may even be alive
                number += 1
        self._path, self._num_batches = path, 0
        self._file = pa.OSFile(str(path), "wb")  # unbuffered, and it raises on a write the disk cut short
        schema = SCHEMAS[self._kind]
        schema = schema.with_metadata({**schema.metadata, CHECKSUM: IN_EVERY_BATCH})
        self._stream = pa.ipc.new_stream(self._file, schema)
        return self._stream

    def _give_up(self) -> None:
        with suppress(OSError, pa.ArrowException):
            self.close()
        if self._path is not None and self._num_batches == 0:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._path = None


def files_of(directory: Path, kind: TableKind, suffix: str = "") -> list[Path]:
    """Files of a table, oldest writer first."""
    return sorted((p for p in directory.glob(f"{kind}-*{suffix}") if p.suffix in {SEGMENT, PARQUET}), key=_number)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
