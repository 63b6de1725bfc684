from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import TelemetryError
from orchestrator.telemetry import store
from orchestrator.telemetry.record import STEP_DTYPE
from orchestrator.telemetry.segment import Segment
from orchestrator.telemetry.store import TelemetryWriter, compact, read_table
from orchestrator.telemetry.tables import SCHEMAS, StepRows, TableKind, row_batch, step_batch
from tests.run_directory import records


def steps(directory: Path) -> pa.Table:
    return read_table(directory, TableKind.STEPS).table


def suffixes(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_a_step_row_has_every_field_of_the_record_and_who_sent_it(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    sent = records(3, generation=7)
    writer.append_steps("a", 2, 1, sent)
    writer.flush()
    table = steps(tmp_path)
    assert table.column_names == ["trial_id", "attempt", "rank", *(STEP_DTYPE.names or ())]
    assert table.select(["trial_id", "attempt", "rank"]).to_pylist() == [{"trial_id": "a", "attempt": 2, "rank": 1}] * 3
    for name in set(STEP_DTYPE.names or ()) - {"tier"}:
        np.testing.assert_array_equal(table[name].to_numpy(), sent[name])
    assert table["tier"].to_pylist() == ["fp32"] * 3
    assert pa.types.is_dictionary(table["tier"].type)


def test_rows_can_be_read_while_the_writer_goes_on(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    for seq in range(0, 30, 10):
        writer.append_steps("a", 0, 0, records(10, seq=seq))
        assert steps(tmp_path).num_rows == seq
        writer.flush()
        assert steps(tmp_path).num_rows == seq + 10


def test_trials_that_appear_later_keep_their_names(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    for name in ("m", "a", "z"):
        writer.append_steps(name, 0, 0, records(1))
        writer.flush()
    assert steps(tmp_path)["trial_id"].to_pylist() == ["a", "m", "z"]
    writer.close()
    assert steps(tmp_path)["trial_id"].to_pylist() == ["a", "m", "z"]


def test_closing_leaves_parquet_alone_and_the_same_rows(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    writer.append_steps("a", 0, 0, records(5))
    writer.append_devices([{"device_id": "d", "t_s": 1.0, "utilisation_ratio": None}])
    writer.append_results([{"trial_id": "a", "index": 0, "metrics": {"x": 1.0, "bad": None}, "checkpoint": None}])
    writer.flush()
    before = {kind: read_table(tmp_path, kind).table for kind in TableKind}
    writer.close()
    assert suffixes(tmp_path) == [".parquet"] * 3
    for kind in TableKind:
        assert read_table(tmp_path, kind).table.equals(before[kind])


def test_a_second_writer_leaves_the_segments_of_the_first_alone(tmp_path: Path) -> None:
    first = TelemetryWriter(tmp_path)
    first.append_steps("a", 0, 0, records(5))
    first.flush()
    (old,) = tmp_path.iterdir()
    content = old.read_bytes()
    second = TelemetryWriter(tmp_path)
    second.append_steps("a", 0, 0, records(5, seq=5))
    second.flush()
    assert old.read_bytes() == content
    assert steps(tmp_path)["seq"].to_pylist() == list(range(10))


def test_a_resent_row_is_kept_once_and_the_first_wins(tmp_path: Path) -> None:
    first, second = TelemetryWriter(tmp_path), TelemetryWriter(tmp_path)
    first.append_steps("a", 0, 0, records(5))
    first.flush()
    resent = records(8)
    resent["loss"] = 9.0
    second.append_steps("a", 0, 0, resent)
    second.append_steps("a", 1, 0, records(1))
    second.append_steps("a", 0, 1, records(1))
    second.flush()
    read = read_table(tmp_path, TableKind.STEPS)
    assert read.num_duplicates == 5
    losses = read.table.filter((pa.compute.field("attempt") == 0) & (pa.compute.field("rank") == 0))["loss"]
    assert losses.to_pylist() == [2.0] * 5 + [9.0] * 3
    assert read.table.num_rows == 10


@pytest.mark.parametrize("kind", [TableKind.DEVICES, TableKind.RESULTS])
def test_resent_device_and_result_rows_are_kept_once(tmp_path: Path, kind: TableKind) -> None:
    row: dict[str, Any] = {"device_id": "d", "t_s": 1.0} if kind is TableKind.DEVICES else {"trial_id": "a", "index": 0}
    writer = TelemetryWriter(tmp_path)
    for _ in range(2):
        (writer.append_devices if kind is TableKind.DEVICES else writer.append_results)([row])
    writer.flush()
    assert read_table(tmp_path, kind).table.num_rows == 1


def segment(directory: Path, trials: Sequence[str]) -> tuple[Path, list[int], list[dict[str, Any]]]:
    """A segment of one batch of ten rows per trial of `trials`; also where each batch ends, and the rows as sent."""
    writer = TelemetryWriter(directory)
    ends, sent = [], []
    for number, trial in enumerate(trials):
        part = records(10, seq=10 * number)
        part["memory_bytes"] = 1 << 30  # the column a tear reaches first; zeros must not be right by chance
        writer.append_steps(trial, 0, 0, part)
        writer.flush()
        (path,) = directory.iterdir()
        ends.append(path.stat().st_size)
        sent += step_batch([StepRows(trial_id=trial, attempt=0, rank=0, records=part)]).to_pylist()
    return path, ends, sent


def rows_left(directory: Path, sent: list[dict[str, Any]]) -> int:
    """Number of rows that are read, after a check that they are the first ones sent, whole batches, and as sent."""
    read = steps(directory).to_pylist()
    assert read == sent[: len(read)]
    assert len(read) % 10 == 0
    return len(read)


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(0, 3), num_torn=st.integers(0, 5000), noise=st.binary(max_size=16))
@example(batch=0, num_torn=11, noise=bytes(10) + b"\x01")  # once changed the last number of that batch and was read so
def test_a_torn_tail_costs_only_the_batch_it_tore(
    tmp_path_factory: pytest.TempPathFactory, batch: int, num_torn: int, noise: bytes
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    path, ends, sent = segment(directory, "aaaa")
    written = path.read_bytes()
    torn = written[: max(0, ends[batch] - num_torn)] + noise
    path.write_bytes(torn)
    whole = sum(torn[:end] == written[:end] for end in ends)  # what is torn off may be zeros, and so may the noise
    assert rows_left(directory, sent) >= 10 * whole  # more only where nothing but padding was torn


NEVER_WRITTEN = bytes(1 << 12)
"""A block that a crash kept from the disk although the file had grown by it; longer than a batch of ten rows."""


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0.0, 1.0, exclude_max=True), damage=st.binary(min_size=1, max_size=1) | st.just(NEVER_WRITTEN))
def test_a_changed_byte_or_block_is_never_read_as_values(
    tmp_path_factory: pytest.TempPathFactory, place: float, damage: bytes
) -> None:
    directory = tmp_path_factory.mktemp("changed")
    path, ends, sent = segment(directory, "abb")  # the second batch also brings another name
    written = path.read_bytes()
    changed = bytearray(written)
    start = ends[0] + int(place * (ends[-1] - ends[0]))
    changed[start : start + len(damage)] = damage
    path.write_bytes(changed)
    read = steps(directory).to_pylist()
    by_batch = [sent[number : number + 10] for number in range(0, len(sent), 10)]
    assert read == [row for rows in by_batch if rows[0] in read for row in rows], "whole batches, as they were sent"
    for rows, end in zip(by_batch, ends, strict=True):
        assert rows[0] in read or changed[:end] != written[:end], "what comes before the damage is there"


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0.0, 1.0, exclude_max=True), damage=st.binary(min_size=1, max_size=64) | st.just(NEVER_WRITTEN))
@example(place=946 / 4880, damage=b"\0")  # another type for the column `share`
def test_a_changed_head_is_never_read_as_values(
    tmp_path_factory: pytest.TempPathFactory, place: float, damage: bytes
) -> None:
    directory = tmp_path_factory.mktemp("head")
    path, ends, sent = segment(directory, "abb")
    changed = bytearray(path.read_bytes())
    start = int(place * ends[0])
    changed[start : start + len(damage)] = damage
    path.write_bytes(changed)
    try:
        read = steps(directory).to_pylist()
    except TelemetryError as error:  # it looks as if another version had written it
        if re.search(r"schema \d+; allowed", str(error)):
            return
        raise
    by_batch = [sent[number : number + 10] for number in range(0, len(sent), 10)]
    assert read == [row for rows in by_batch if rows[0] in read for row in rows], "whole batches, as they were sent"


def test_a_head_without_a_version_is_noted_and_does_not_break_the_others(tmp_path: Path) -> None:
    path, _, sent = segment(tmp_path, "ab")
    content = path.read_bytes()
    place = content.index(b"orchestrator.schema")
    path.with_name("steps-00002.arrows").write_bytes(content[:place] + bytes(40) + content[place + 40 :])
    assert steps(tmp_path).to_pylist() == sent
    (note,) = read_table(tmp_path, TableKind.STEPS).notes
    assert "no readable head" in note


def test_a_changed_number_costs_its_batch_and_none_behind_it(tmp_path: Path) -> None:
    path, ends, sent = segment(tmp_path, "aaaa")
    content = path.read_bytes()
    place = content.index((1 << 30).to_bytes(8, "little"), ends[0])
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    assert steps(tmp_path).to_pylist() == sent[:10] + sent[20:]
    (note,) = read_table(tmp_path, TableKind.STEPS).notes
    assert "torn after 10 rows (batches that are not as they were written: 1)" in note
    compact(tmp_path)
    assert steps(tmp_path).to_pylist() == sent[:10] + sent[20:]


def test_blocks_of_zeros_behind_whole_batches_are_noted(tmp_path: Path) -> None:
    path, ends, sent = segment(tmp_path, "aaa")
    path.write_bytes(path.read_bytes()[: ends[1]] + NEVER_WRITTEN)
    assert rows_left(tmp_path, sent) == 20
    (note,) = read_table(tmp_path, TableKind.STEPS).notes
    assert "torn after 20 rows (there is more behind its end)" in note


@pytest.mark.parametrize("is_key", [True, False])
def test_a_batch_that_lost_its_checksum_is_torn(tmp_path: Path, is_key: bool) -> None:
    path, ends, sent = segment(tmp_path, "aa")
    content = path.read_bytes()
    reader = pa.ipc.open_stream(content)
    reader.read_next_batch()
    ((key, value),) = reader.read_next_batch_with_custom_metadata().custom_metadata.items()
    lost = key if is_key else value
    assert content.count(lost, ends[0]) == 1
    path.write_bytes(content[: ends[0]] + content[ends[0] : -1].replace(lost, bytes(len(lost))) + b"\x01")
    assert "torn after 10 rows" in read_table(tmp_path, TableKind.STEPS).notes[0]
    compact(tmp_path)
    assert rows_left(tmp_path, sent) == 10


@pytest.mark.parametrize("damaged", [b"loss_norm", b"\xff" * 9])
def test_a_column_under_another_name_is_torn(tmp_path: Path, damaged: bytes) -> None:
    path, _, sent = segment(tmp_path, "a")
    content = path.read_bytes()
    assert content.count(b"grad_norm") == 1
    path.write_bytes(content.replace(b"grad_norm", damaged))
    assert rows_left(tmp_path, sent) == 0


BATCHES = {
    TableKind.STEPS: step_batch([StepRows(trial_id="a", attempt=0, rank=0, records=records(3))]),
    TableKind.DEVICES: row_batch(TableKind.DEVICES, [{"device_id": "d", "t_s": 1.0}, {"device_id": "d", "t_s": 2.0}]),
    TableKind.RESULTS: row_batch(TableKind.RESULTS, [{"trial_id": "a", "index": 0, "metrics": {"x": 1.0, "y": None}}]),
}


@pytest.mark.parametrize("kind", TableKind)
def test_a_segment_from_before_there_were_checksums_is_read(tmp_path: Path, kind: TableKind) -> None:
    batch = BATCHES[kind]
    with (
        pa.OSFile(str(tmp_path / f"{kind}-00001.arrows"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMAS[kind]) as stream,
    ):
        stream.write_batch(batch)
    read = read_table(tmp_path, kind)
    assert read.table.to_pylist() == batch.to_pylist()
    assert not read.notes


def test_a_torn_segment_is_noted_and_does_not_break_the_others(tmp_path: Path) -> None:
    for seq in (0, 10):
        writer = TelemetryWriter(tmp_path)
        writer.append_steps("a", 0, 0, records(10, seq=seq))
        writer.flush()
    torn = min(tmp_path.iterdir())
    torn.write_bytes(torn.read_bytes()[:-3])
    read = read_table(tmp_path, TableKind.STEPS)
    assert read.table["seq"].to_pylist() == list(range(10, 20))
    assert "torn after 0 rows" in read.notes[0]
    compact(tmp_path)
    assert steps(tmp_path)["seq"].to_pylist() == list(range(10, 20))


@pytest.mark.parametrize("content", [b"", b"\x00", b"not arrow at all, " * 20])
def test_a_file_that_is_no_segment_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "steps-00001.arrows").write_bytes(content)
    (tmp_path / "steps-00002.parquet").write_bytes(content)
    writer = TelemetryWriter(tmp_path)
    writer.append_steps("a", 0, 0, records(2))
    writer.flush()
    read = read_table(tmp_path, TableKind.STEPS)
    assert read.table.num_rows == 2
    assert read.notes


def test_a_crash_between_rename_and_removal_duplicates_nothing(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    writer.append_steps("a", 0, 0, records(10))
    writer.flush()
    (segment,) = tmp_path.iterdir()
    content = segment.read_bytes()
    writer.close()
    segment.write_bytes(content)
    assert steps(tmp_path).num_rows == 10
    TelemetryWriter(tmp_path).close()
    assert suffixes(tmp_path) == [".parquet"]
    assert steps(tmp_path).num_rows == 10


def test_a_segment_that_comes_back_torn_does_not_replace_what_was_compacted(tmp_path: Path) -> None:
    path, ends, sent = segment(tmp_path, "aaaaa")
    content = path.read_bytes()
    compact(tmp_path)
    path.write_bytes(content[: ends[1]])  # a crash had undone its removal, and its last blocks never reached the disk
    assert steps(tmp_path).to_pylist() == sent
    compact(tmp_path)
    assert suffixes(tmp_path) == [".parquet"]
    assert steps(tmp_path).to_pylist() == sent


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), pa.ArrowMemoryError("malloc failed")])
def test_a_disk_or_memory_that_fails_while_compacting_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _, _, sent = segment(tmp_path, "aaaaa")
    looks = []

    def fail_at_the_second(batch: pa.RecordBatch, metadata: object, is_sealed: bool) -> bool:
        looks.append(batch)
        if len(looks) == 2:
            raise error
        return True

    with monkeypatch.context() as patch:
        patch.setattr(store, "_is_as_written", fail_at_the_second)
        with pytest.raises(TelemetryError, match="the segment was kept"):
            compact(tmp_path)
    assert suffixes(tmp_path) == [".arrows"]
    assert steps(tmp_path).to_pylist() == sent


def test_reports_that_a_later_attempt_makes_again_are_kept_beside_the_first(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    rows = [{"trial_id": "a", "attempt": attempt, "index": 4} for attempt in (0, 1, 1)]
    writer.append_results(rows)
    writer.flush()
    found = read_table(tmp_path, TableKind.RESULTS)
    assert [row["attempt"] for row in found.table.to_pylist()] == [0, 1]
    assert found.num_duplicates == 1


def test_a_crash_inside_compaction_leaves_the_segment_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TelemetryWriter(tmp_path)
    writer.append_steps("a", 0, 0, records(10))
    writer.flush()

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_sync", full_disk)
    with pytest.raises(TelemetryError, match="the segment was kept"):
        writer.close()
    assert suffixes(tmp_path) == [".arrows"]
    assert steps(tmp_path).num_rows == 10


class FullDisk:
    """Stands for a segment whose writes fail while `is_full`."""

    def __init__(self) -> None:
        self.is_full = True
        self.num_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.num_rows += batch.num_rows

    def close(self) -> None: ...


def test_rows_wait_in_bounded_memory_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BUFFERED_ROWS", 25)
    writer, disk = TelemetryWriter(tmp_path), FullDisk()
    monkeypatch.setitem(writer._segments, TableKind.STEPS, disk)
    for seq in range(0, 40, 10):
        writer.append_steps("a", 0, 0, records(10, seq=seq))
        assert not writer.flush()
    assert writer.num_rows_dropped == 20
    disk.is_full = False
    assert writer.flush()
    assert disk.num_rows == 20


def test_closing_on_a_full_disk_says_what_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TelemetryWriter(tmp_path)
    monkeypatch.setitem(writer._segments, TableKind.STEPS, FullDisk())
    writer.append_steps("a", 0, 0, records(10))
    with pytest.raises(TelemetryError, match="10 step rows lost"):
        writer.close()


class TornStream:
    """Stands for a stream whose last write was cut short."""

    def write_batch(self, batch: pa.RecordBatch, custom_metadata: object) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None: ...


@pytest.mark.parametrize(("num_before", "num_left"), [(0, 1), (2, 2)])
def test_a_segment_that_failed_is_given_up_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_before: int, num_left: int
) -> None:
    segment = Segment(tmp_path, TableKind.STEPS)
    batches = [
        step_batch([StepRows(trial_id="a", attempt=0, rank=0, records=records(4, seq=4 * number))])
        for number in range(num_before + 1)
    ]
    for batch in batches[:-1]:
        segment.write(batch)
    with monkeypatch.context() as patched:
        patched.setattr(pa.ipc, "new_stream", lambda *_: TornStream())
        if num_before:
            segment._stream = TornStream()
        with pytest.raises(OSError, match="No space"):
            segment.write(batches[-1])
    segment.write(batches[-1])
    assert len(list(tmp_path.iterdir())) == num_left
    assert steps(tmp_path)["seq"].to_pylist() == list(range(4 * (num_before + 1)))


def test_records_the_caller_changes_later_are_stored_as_they_were(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    ring = records(3)
    writer.append_steps("a", 0, 0, ring)
    ring["loss"] = -1.0
    writer.flush()
    assert steps(tmp_path)["loss"].to_pylist() == [2.0] * 3


def test_a_tier_code_that_names_nothing_becomes_null(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    odd = records(3)
    odd["tier"] = [0, -1, 999]
    writer.append_steps("a", 0, 0, odd)
    writer.flush()
    assert steps(tmp_path)["tier"].to_pylist() == ["fp32", None, None]


def test_many_rows_are_written_without_waiting_for_a_flush(tmp_path: Path) -> None:
    writer = TelemetryWriter(tmp_path)
    writer.append_steps("a", 0, 0, records(70_000))
    assert steps(tmp_path).num_rows == 70_000


def test_records_of_another_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match="allowed: STEP_DTYPE"):
        TelemetryWriter(tmp_path).append_steps("a", 0, 0, np.zeros(1, dtype=[("seq", "<u8")]))


@pytest.mark.parametrize("row", [{"device": "d"}, {"device_id": "d", "units": "many"}, {"units": 2**40}])
def test_a_row_that_fits_no_column_is_refused_at_once(tmp_path: Path, row: dict[str, Any]) -> None:
    writer = TelemetryWriter(tmp_path)
    with pytest.raises(TelemetryError, match="devices"):
        writer.append_devices([row])
    assert writer.flush()


def write_schema(path: Path, version: bytes, columns: list[str]) -> None:
    batch = step_batch([StepRows(trial_id="a", attempt=0, rank=0, records=records(2))])
    table = pa.Table.from_batches([batch]).select(columns).replace_schema_metadata({"orchestrator.schema": version})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize("suffix", ["arrows", "parquet"])
def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"steps-00001.{suffix}"
    write_schema(path, b"99", ["trial_id", "seq"])
    with pytest.raises(TelemetryError, match=r"schema 99; allowed: 1\.\.1"):
        steps(tmp_path)
    compact(tmp_path)
    assert path.exists()


@pytest.mark.parametrize("suffix", ["arrows", "parquet"])
def test_columns_an_older_file_lacks_become_null(tmp_path: Path, suffix: str) -> None:
    write_schema(tmp_path / f"steps-00001.{suffix}", b"1", ["trial_id", "attempt", "rank", "seq"])
    table = steps(tmp_path)
    assert table.schema.equals(SCHEMAS[TableKind.STEPS])
    assert table["loss"].null_count == table.num_rows == 2


def test_an_empty_directory_gives_empty_tables_with_all_columns(tmp_path: Path) -> None:
    for kind in TableKind:
        assert read_table(tmp_path, kind).table.schema.equals(SCHEMAS[kind])
    TelemetryWriter(tmp_path).close()
    assert not list(tmp_path.iterdir())
