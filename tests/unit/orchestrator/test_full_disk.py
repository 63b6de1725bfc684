"""A full disk: who has to write waits, says where and how much, and goes on to the same results when there is room."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator import beginning, evidence, room
from orchestrator.config import load_config
from orchestrator.control.fault_events import CommitDamaged
from orchestrator.control.orders import Cause, Events, Note, Outcome, SlotOrder, Status, StopMode
from orchestrator.control.resumption import keep_commit
from orchestrator.control.status import write_file
from orchestrator.control.world import TrialState
from orchestrator.errors import JournalError, NoRoomError, UnfitEnvironmentError
from orchestrator.jobs import build_job
from orchestrator.policies.plan import TrialId
from orchestrator.run_dirs import mark_ended, read_status
from orchestrator.telemetry.record import STEP_DTYPE
from orchestrator.telemetry.store import TelemetryWriter, read_table
from orchestrator.telemetry.tables import TableKind
from orchestrator.train import best, checkpoint
from orchestrator.train.function import commits
from orchestrator.train.function.autocast import Autocast
from orchestrator.train.function.watched import Watched
from orchestrator.train.function.workplace import logged_to
from orchestrator.train.isolation import seed_generators
from orchestrator.train.precision.calibrate import CostFile
from tests.unit.orchestrator.control.worlds import World
from tests.unit.orchestrator.durable_writes import SITES, When, found, full_at
from tests.unit.orchestrator.train.links import Script, loop, order, settings

T0 = TrialId("t0")


@pytest.fixture(autouse=True)
def _nobody_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.train.attempt.POLL_S", 0.001)


def test_every_write_of_the_code_is_in_the_list_with_what_happens_on_a_full_disk() -> None:
    """Whoever adds a write says there what becomes of it; whoever takes one away takes it out."""
    assert set(found()) == set(SITES), "see tests/unit/orchestrator/durable_writes.py"
    assert all(isinstance(when, When) for when in SITES.values())


def trained(directory: Path) -> Script:
    script = Script(order(directory, samples_per_report=80))
    seed_generators(3)
    loop(script, build_job("mlp", {"width": 16, "num_samples": 512})).run()
    script.collect()
    return script


@pytest.mark.parametrize("function", ["_write_parts", "write_synced", "sync_files", "sync_directory"])
def test_a_commit_waits_for_room_and_the_trial_goes_on_to_the_same_result(tmp_path: Path, function: str) -> None:
    straight = trained(tmp_path / "a")
    with full_at(function, times=3) as failed:
        waited = trained(tmp_path / "b")
    assert len(failed) == 3
    assert [r.metrics for r in waited.reports] == [r.metrics for r in straight.reports]
    assert "no room" in waited.notes[0].text
    assert waited.notes[-1] == Note(kind="room", text="")
    assert [path.name for path in sorted((tmp_path / "b" / "checkpoints").glob("step-*"))] == ["step-10", "step-20"]


def test_where_one_rank_has_no_room_all_of_them_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that went on alone would wait in the next collective for ever."""
    told = [(None, "mine"), (("no room on the disk", True), None)]
    monkeypatch.setattr(checkpoint._Ranks, "gather", lambda _self, _value: told)
    with pytest.raises(NoRoomError, match="cannot write it: rank 1: no room on the disk"):
        checkpoint._Ranks(0, 2, None).agree("cannot write it", None, "mine")


def test_a_trial_that_waits_for_room_leaves_when_the_search_has_no_further_use_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(order(tmp_path, samples_per_report=80))

    def discard(now: SlotOrder) -> SlotOrder:
        return replace(now, stop=StopMode.DISCARD)

    with full_at("_write_parts"):
        waiting = loop(script, build_job("mlp", {"width": 16, "num_samples": 512}))
        monkeypatch.setattr(script.outbox, "add_note", lambda _note: script.at(0, discard))
        assert waiting.run().status is Status.STOPPED
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_commit_of_a_function_waits_too(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("x")
    with full_at("commit_files"), pytest.raises(NoRoomError, match=r"no room on the disk: .* needs 1 bytes, .* free"):
        commits.commit(tmp_path / "checkpoints", tmp_path / "state", {"step": 3})
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert commits.commit(tmp_path / "checkpoints", tmp_path / "state", {"step": 3}).is_dir()


def test_a_commit_of_a_watched_model_waits_where_torch_hides_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing: Any = None
    seen = Watched(nn.Linear(4, 2), None, Autocast(torch.device("cpu"), settings()), standing)

    def full(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    needed: list[int] = []

    def has_room(_path: Path, needed_bytes: int) -> bool:
        needed.append(needed_bytes)
        return False

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        patch.setattr(checkpoint, "has_room", has_room)
        with pytest.raises(NoRoomError, match="no room on the disk"):
            commits.commit(tmp_path / "checkpoints", None, {"step": 3}, seen)
    assert needed == [40], "the bytes of its parameters"
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert commits.commit(tmp_path / "checkpoints", None, {"step": 3}, seen).is_dir()


def test_a_commit_that_a_search_wants_to_keep_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = tmp_path / "checkpoints" / "step-3"
    commit.mkdir(parents=True)
    (commit / "x").write_text("x")

    def full(*_paths: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", full)
        with pytest.raises(JournalError, match="no room"):
            keep_commit(commit, tmp_path / "pinned", "0-1")
    assert keep_commit(commit, tmp_path / "pinned", "0-1").is_dir()


def test_the_journal_says_how_much_is_missing_and_nothing_is_lost(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    with full_at("_write"), pytest.raises(JournalError, match=r"journal.jsonl needs \d+ bytes, .* free"):
        world.controller.submit(T0, {"lr": 0.1})
    assert T0 not in world.controller.run.trials
    world.controller.submit(T0, {"lr": 0.1})
    with full_at("sync"), pytest.raises(JournalError):
        world.perform()
    world.perform()
    world.restart()
    assert world.trial(T0).state is TrialState.QUEUED


def test_tables_wait_in_memory_and_raise_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TelemetryWriter(tmp_path)
    rows = np.zeros(5, dtype=STEP_DTYPE)
    rows["seq"] = range(5)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.telemetry.segment.Segment._open", full)
        writer.append_steps("t0", 0, 0, rows)
        assert not writer.flush()
    assert writer.alarm is not None
    assert f"5 rows of telemetry wait: no room on the disk: {tmp_path} needs" in writer.alarm
    writer.close()
    assert writer.alarm is None
    assert read_table(tmp_path, TableKind.STEPS).table.num_rows == 5


def test_the_status_is_written_over_where_there_is_no_room_to_replace_it(tmp_path: Path) -> None:
    write_file(tmp_path, {"state": "running", "trouble": None})
    with full_at("write_file") as failed:
        write_file(tmp_path, {"state": "running", "trouble": "no room on the disk"})
    assert failed
    assert read_status(tmp_path) == {"state": "running", "trouble": "no room on the disk"}
    assert not list(tmp_path.glob("*.tmp"))


def test_alarms_and_what_a_trial_waits_for_are_in_the_live_table(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    worker = world.attach("slot-0")
    world.controller.submit(T0, {"lr": 0.1})
    world.ask(T0, 0)
    world.decide()
    worker.obey()
    worker.tell(Events(number=1, notes=(Note(kind="room", text="no room on the disk: /c needs 3.0 MiB"),)))
    assert "! no room on the disk: /c needs 3.0 MiB" in world.shown()
    worker.tell(Events(number=2, notes=(Note(kind="room", text=""),)))
    assert "no room" not in world.shown()
    assert CommitDamaged.kind not in (world.run_dir / "journal.jsonl").read_text()


def test_a_function_that_met_the_full_disk_itself_begins_again_a_few_times(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    worker = world.attach("slot-0")
    world.controller.submit(T0, {"lr": 0.1})
    states = []
    for _ in range(2):
        world.ask(T0, 0)
        world.decide()
        worker.obey()
        assert worker.attempt is not None
        outcome = Outcome(status=Status.FAILED, step=1, num_samples=8, reason="no space left", cause=Cause.DISK)
        world.controller.finish("slot-0", worker.epoch, worker.attempt, outcome)
        states.append((world.trial(T0).attempt, world.trial(T0).state))
    assert states == [(1, TrialState.RUNNING), (1, TrialState.FAILED)]


def test_what_a_training_prints_never_fails_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged_to(tmp_path / "log.txt"):
        with suppress(OSError), Path("/dev/full").open("w") as full:
            handler: Any = logging.getLogger().handlers[0]
            plain, handler.stream = handler.stream, full
            sys.stdout.write("one\n")
            handler.stream = plain
        sys.stdout.write("two\n")
    assert (tmp_path / "log.txt").read_text().endswith("two\n")
    capsys.readouterr()


def test_a_run_that_cannot_be_made_on_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"name": "r", "storage": str(tmp_path / "runs"), "job": {"name": "mlp"}}))
    resolved = load_config(file, [])

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginning, "write_atomically", full)
        with pytest.raises(UnfitEnvironmentError, match="no room on the disk"):
            beginning.make_run_dir(resolved)
    assert not resolved.run_dir.exists()


def test_what_a_run_can_do_without_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    world.controller.submit(T0, {"lr": 0.1})
    world.perform()
    with full_at("save") as failed:
        assert not world.controller.engine.rotate(0)
    with full_at("write_atomically") as unwritten:
        evidence.record_or_not(world.run_dir)
        assert not best.note(tmp_path, best.Best(commit="step-1", step=1, metric="x", value=1.0), "min")
        write_file(world.run_dir, {"state": "running"})
        mark_ended(world.run_dir, "failed")
    tier_costs = CostFile.of(tmp_path, "key")
    with full_at("store") as uncalibrated:
        tier_costs.store("key", {})
    assert failed
    assert len(unwritten) == 3
    assert uncalibrated
    assert world.controller.engine.rotate(0)


def test_a_run_that_begins_on_a_full_disk_says_so_once_and_waits(tmp_path: Path) -> None:
    told: list[str] = []
    with full_at("has_room", times=3) as failed:
        assert room.wait(tmp_path, 1, told.append, lambda: False)
    assert (len(failed), len(told)) == (3, 1)
    assert f"{tmp_path} needs 1 bytes" in told[0]
    with full_at("has_room"):
        assert not room.wait(tmp_path, 1, told.append, lambda: True)


def test_room_is_what_can_be_written(tmp_path: Path) -> None:
    assert room.has_room(tmp_path / "not" / "there")
    assert not room.has_room(tmp_path, 1 << 60)
    with full_at("has_room"):
        assert not room.has_room(tmp_path)
    assert room.words(tmp_path, 3 << 20).startswith(f"no room on the disk: {tmp_path} needs 3.0 MiB, ")
    chained = ValueError("x")
    chained.__cause__ = OSError(28, "full")
    assert room.is_full(chained)
    assert not room.is_full(OSError(13, "denied"))
    assert list(tmp_path.iterdir()) == []
