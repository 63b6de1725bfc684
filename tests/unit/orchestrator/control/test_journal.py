"""The journal: what was appended comes back, whatever a crash did to its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.control.events import PlanRefused, ReportTold
from orchestrator.control.journal import Journal, read
from orchestrator.errors import JournalError
from orchestrator.policies.plan import Generation, TrialId


def told(index: int) -> ReportTold:
    return ReportTold(trial_id=TrialId("t"), index=index, t_s=1.0, wall_s=2.0)


def write(path: Path, count: int) -> None:
    journal = Journal(path)
    for number in range(count):
        journal.append([told(number)])
    journal.close()


def test_entries_come_back_in_order_and_numbered(tmp_path: Path) -> None:
    write(tmp_path / "j", 3)
    assert [(entry["seq"], entry["index"]) for entry in read(tmp_path / "j")] == [(1, 0), (2, 1), (3, 2)]


def test_a_line_is_canonical(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append([PlanRefused(generation=Generation(4), reason="b", violations=("x", "y"), t_s=1.5, wall_s=2.0)])
    journal.close()
    assert (tmp_path / "j").read_text() == (
        '{"_crc":"81c29340","generation":4,"kind":"refusal","reason":"b","seq":1,"t_s":1.5,"violations":["x","y"],"wall_s":2.0}\n'
    )


@pytest.mark.parametrize("torn", [b"{", b'{"kind":"thing"', b"\xff\x00"])
def test_a_torn_line_is_not_read_and_a_new_writer_drops_it(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "j"
    write(path, 2)
    path.write_bytes(path.read_bytes() + torn)
    assert len(list(read(path))) == 2
    journal = Journal(path)
    journal.append([told(2)])
    journal.close()
    assert [entry["index"] for entry in read(path)] == [0, 1, 2]


def test_every_cut_of_the_file_leaves_a_readable_prefix(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 3)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        entries = list(read(path))
        assert [entry["index"] for entry in entries] == list(range(whole[:length].count(b"\n")))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 3)
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-1]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(JournalError, match=":2: damaged journal line"):
        list(read(path))


def test_nan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with pytest.raises(JournalError, match="not plain JSON"):
        journal.append([ReportTold(trial_id=TrialId("t"), index=0, held_s=float("nan"))])
    journal.close()
    assert (tmp_path / "j").read_bytes() == b""


def test_a_line_that_still_is_json_but_not_what_was_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 3)
    path.write_bytes(path.read_bytes().replace(b'"index":1', b'"index":7'))
    with pytest.raises(JournalError, match=r":2: damaged journal line .its checksum does not fit.*orchestrator repair"):
        list(read(path))


def test_a_line_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 3)
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last)
    with pytest.raises(JournalError, match=r":2: .*entry 1 is followed by entry 3"):
        list(read(path))


def test_a_refused_write_leaves_the_file_as_it_was_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append([told(0)])
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[:5]))
        with pytest.raises(JournalError, match="only a part"):
            journal.append([told(1)])
    assert [entry["index"] for entry in read(path)] == [0]
    journal.append([told(1), told(2)])
    journal.close()
    assert [(entry["seq"], entry["index"]) for entry in read(path)] == [(1, 0), (2, 1), (3, 2)]


def test_what_a_failed_sync_may_have_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a file whose fsync failed may be dropped although a later fsync says that all is well."""
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append([told(0)])
    journal.sync()
    journal.append([told(1)])

    def fail(_file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(JournalError, match="durable"):
            journal.sync()
    assert not journal.is_synced
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1] + b"\0" * 20)
    journal.append([told(2)])
    journal.close()
    assert [entry["index"] for entry in read(path)] == [0, 1, 2]


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot read the journal"):
        list(read(tmp_path / "none"))
