"""A damaged journal is made whole: what is not damaged is kept, what is lost is said, and the run can go on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.journal import FILE_NAME, read_events
from orchestrator.control.repair import repair
from orchestrator.control.world import TrialState
from orchestrator.errors import ConfigError, JournalError
from orchestrator.policies.plan import TrialId
from tests.unit.orchestrator.control.worlds import World

T0, T1 = TrialId("t0"), TrialId("t1")


def stopped(run_dir: Path) -> World:
    """A run of two trials, the first of which has made two reports, whose actor has ended."""
    world = World(run_dir)
    worker = world.attach("slot-0")
    for trial_id in (T0, T1):
        world.controller.submit(trial_id, {"lr": 0.1})
    world.decide()
    for index in range(2):
        worker.obey()
        worker.report(index, 1.0 + index)
    world.close()
    return world


def damage(run_dir: Path, kind: str, number: int = 0) -> None:
    """Flip a bit in the n-th entry of a kind."""
    path = run_dir / FILE_NAME
    lines = path.read_bytes().split(b"\n")
    places = [place for place, line in enumerate(lines) if f'"kind":"{kind}"'.encode() in line]
    line = bytearray(lines[places[number]])
    line[-3] ^= 1
    lines[places[number]] = bytes(line)
    path.write_bytes(b"\n".join(lines))


def taken_up(world: World) -> World:
    """The run, started anew."""
    return World(world.run_dir, start_id="s2", clock=world.clock, num_attached=9)


def test_a_whole_journal_stays_as_it_is(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    before = (world.run_dir / FILE_NAME).read_bytes()
    found = repair(world.run_dir)
    assert (found.num_kept, found.damage, found.kept_as) == (found.num_lines, (), None)
    assert (world.run_dir / FILE_NAME).read_bytes() == before


def test_a_damaged_line_stops_a_run_with_its_number_and_the_command_that_helps(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    damage(world.run_dir, "ack")
    with pytest.raises(JournalError, match=r"damaged journal line .*orchestrator repair"):
        taken_up(world)


def test_a_lost_acknowledgement_costs_nothing(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    damage(world.run_dir, "ack")
    found = repair(world.run_dir)
    assert (len(found.damage), found.impossible, found.num_kept) == (1, (), found.num_lines - 1)
    assert found.kept_as is not None
    assert found.kept_as.exists()
    again = taken_up(world)
    trial = again.trial(T0)
    assert (trial.state, [report.index for report in trial.reports]) == (TrialState.QUEUED, [0, 1])
    assert [event.seq for event in read_events(world.run_dir / FILE_NAME)][:3] == [1, 2, 3]
    again.close()


def test_a_lost_report_is_taken_from_the_table_of_results(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    damage(world.run_dir, "result")
    found = repair(world.run_dir)
    assert (found.num_restored, found.num_kept) == (1, found.num_lines)
    again = taken_up(world)
    reports = again.trial(T0).reports
    assert [(report.index, report.metrics["val_loss"], report.checkpoint) for report in reports] == [
        (0, 1.0, "/c/0"),
        (1, 2.0, "/c/1"),
    ]
    again.close()


def test_what_cannot_have_happened_without_a_lost_entry_is_left_out_and_said(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    damage(world.run_dir, "trial_queued")
    found = repair(world.run_dir)
    assert any("there is no trial 't0'" in text or "t0 does not wait" in text for text in found.impossible)
    again = taken_up(world)
    assert list(again.controller.run.trials) == [T1]
    again.close()


def test_a_line_that_is_gone_is_repaired_too(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    path = world.run_dir / FILE_NAME
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if b'"kind":"ack"' not in line]
    path.write_bytes(b"".join(lines))
    found = repair(world.run_dir)
    assert (found.damage, found.num_kept) == ((), len(lines))
    taken_up(world).close()


def test_without_its_head_nothing_can_be_taken_up(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    damage(world.run_dir, "run")
    before = (world.run_dir / FILE_NAME).read_bytes()
    with pytest.raises(JournalError, match="first line, which says what the run is"):
        repair(world.run_dir)
    assert (world.run_dir / FILE_NAME).read_bytes() == before


def test_a_run_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no journal"):
        repair(tmp_path)
