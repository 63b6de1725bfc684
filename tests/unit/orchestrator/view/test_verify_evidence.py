"""Evidence that is missing, short or altered is a violation of its own, whatever was done to it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import evidence
from orchestrator.view.finding import Code, sentence
from orchestrator.view.verify import verify
from tests.run_directory import healthy_run

SEEN = {Code.EVIDENCE_MISSING, Code.EVIDENCE_ALTERED, Code.JOURNAL_TORN}


def codes(run_dir: Path) -> set[str]:
    return {violation["code"] for violation in verify(run_dir, reads_checkpoints=True)["violations"]}


def files_of(run_dir: Path) -> list[Path]:
    """Everything but the status, which the journal outlives, and the record itself."""
    found = [path for path in run_dir.rglob("*") if path.is_file()]
    return sorted(path for path in found if path.name not in {"status.json", "evidence.json"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return healthy_run(tmp_path_factory.mktemp("whole") / "run").complete()


def copy_of(whole: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(whole, to))


def test_a_run_with_all_of_its_evidence_has_no_violation(whole: Path) -> None:
    answer = verify(whole, reads_checkpoints=True)
    assert answer["violations"] == []
    assert answer["notes"] == []


def test_of_200_ways_to_lose_or_alter_evidence_all_are_found(whole: Path, tmp_path: Path) -> None:
    draw, names = random.Random(0), [path.relative_to(whole) for path in files_of(whole)]
    assert len(names) >= 15
    ways: list[tuple[str, Path, Callable[[bytes], bytes | None]]] = []
    for name in names:
        ways.append(("removed", name, lambda _data: None))
        ways.append(("emptied", name, lambda _data: b""))
        ways.append(("cut", name, lambda data: data[: draw.randrange(len(data))]))
        if name.name != "journal.jsonl":  # which is added to when the run is resumed
            ways.append(("longer", name, lambda data: data + b"x"))
    while len(ways) < 200:
        ways.append(("flipped", draw.choice(names), lambda data: _flip(data, draw)))
    broken, missed = copy_of(whole, tmp_path / "run"), []
    for how, name, change in ways:
        whole_data = (broken / name).read_bytes()
        data = change(whole_data)
        (broken / name).unlink()
        if data is not None:
            (broken / name).write_bytes(data)
        if not codes(broken) & SEEN:
            missed.append(f"{how} {name}")
        (broken / name).write_bytes(whole_data)
    assert missed == []
    assert codes(broken) == set(), "all was put back"


def _flip(data: bytes, draw: random.Random) -> bytes:
    position = draw.randrange(8 * len(data))
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("telemetry", "no step record is there of the 10 steps that it did"),
        ("trials", "its last commit trials/a/checkpoints/step-10 is missing"),
        ("telemetry/results-00001.parquet", "report 0 is missing in the table of results"),
        (
            "telemetry/devices-00001.parquet",
            "telemetry/devices-00001.parquet is missing; it was there when the run ended",
        ),
        ("journal.jsonl", "journal.jsonl is missing; it was there when the run ended"),
        ("control/evidence.json", "control/evidence.json is missing: whether files are as the run left them"),
    ],
)
def test_what_is_gone_is_said(whole: Path, tmp_path: Path, removed: str, words: str) -> None:
    broken = copy_of(whole, tmp_path / "run")
    place = broken / removed
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert any(words in text for text in texts(broken)), texts(broken)


def texts(run_dir: Path) -> list[str]:
    return [str(violation["text"]) for violation in verify(run_dir)["violations"]]


def test_without_the_record_the_journal_tells_what_must_be_there(whole: Path, tmp_path: Path) -> None:
    """As in a run of an earlier version, or one whose folder `control` is gone with the rest."""
    broken = copy_of(whole, tmp_path / "run")
    shutil.rmtree(broken / "control")
    assert texts(broken) == []
    _rewrite(broken / "telemetry" / "steps-00001.parquet", lambda table: table.slice(0, 8))
    assert any("step records of rank 0 end at step 8; the trial ended after step 10" in text for text in texts(broken))
    broken = copy_of(whole, tmp_path / "run")
    shutil.rmtree(broken / "control")
    _rewrite(broken / "telemetry" / "results-00001.parquet", _with_other_samples)
    assert any("report 0 in the table of results is not the one in the journal" in text for text in texts(broken))
    _rewrite(broken / "telemetry" / "results-00001.parquet", lambda table: table.slice(1))
    assert any("report 0 is missing in the table of results" in text for text in texts(broken))
    shutil.rmtree(broken / "trials" / "b" / "checkpoints" / "step-10")
    assert any("its last commit trials/b/checkpoints/step-10 is missing" in text for text in texts(broken))


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def _with_other_samples(table: pa.Table) -> pa.Table:
    column = table.column_names.index("num_samples")
    return table.set_column(column, table.schema.field(column), pa.array([41] * table.num_rows, pa.int64()))


def test_a_table_that_somebody_added_is_no_evidence(whole: Path, tmp_path: Path) -> None:
    broken = copy_of(whole, tmp_path / "run")
    shutil.copy(broken / "telemetry" / "steps-00001.parquet", broken / "telemetry" / "steps-00009.parquet")
    assert "telemetry/steps-00009.parquet was not there when the run ended" in texts(broken)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99, "files": {}}', '{"files": 7, "schema": 1}']
)
def test_a_record_that_cannot_be_read_is_a_violation_and_no_traceback(whole: Path, tmp_path: Path, text: str) -> None:
    broken = copy_of(whole, tmp_path / "run")
    (broken / "control" / "evidence.json").write_text(text)
    assert any("control/evidence.json" in found for found in texts(broken))


def test_a_flipped_bit_of_a_tensor_is_found_when_checkpoints_are_read(whole: Path, tmp_path: Path) -> None:
    broken = copy_of(whole, tmp_path / "run")
    file = broken / "trials" / "a" / "checkpoints" / "step-5" / "__0_0.distcp"
    file.write_bytes(_flip(file.read_bytes(), random.Random(1)))
    assert texts(broken) == []
    (violation,) = verify(broken, reads_checkpoints=True)["violations"]
    assert "the commit trials/a/checkpoints/step-5 is damaged: __0_0.distcp has SHA-256" in violation["text"]


def test_a_run_that_goes_on_has_no_record_and_no_violation(whole: Path, tmp_path: Path) -> None:
    going = copy_of(whole, tmp_path / "run")
    (going / "status.json").write_text(json.dumps({"state": "running"}))
    evidence.forget(going)
    evidence.forget(going)
    shutil.rmtree(going / "trials")
    (going / "telemetry" / "results-00001.parquet").unlink()
    assert texts(going) == []


def test_a_violation_is_a_sentence() -> None:
    found: dict[str, object] = {
        "code": "leak",
        "text": "the run left behind 2 actors",
        "trial_id": None,
        "generation": None,
    }
    assert sentence(found) == "the run left behind 2 actors [leak]"
    found |= {"trial_id": "trial-1", "generation": 3}
    assert sentence(found) == "trial-1: the run left behind 2 actors (plan 3) [leak]"


def test_files_of_the_journal_that_were_full_are_evidence_too(whole: Path, tmp_path: Path) -> None:
    run_dir = copy_of(whole, tmp_path / "run")
    full = run_dir / "journal-000000005.jsonl"
    full.write_text("five lines\n")
    evidence.record(run_dir)
    assert list(evidence.differences(run_dir)) == []
    full.write_text("five lines\nand one\n")
    (found,) = evidence.differences(run_dir)
    assert str(found) == f"{full.name} is not as it was when the run ended (19 bytes instead of 11)"
    full.unlink()
    (found,) = evidence.differences(run_dir)
    assert found.fault is evidence.Fault.MISSING
