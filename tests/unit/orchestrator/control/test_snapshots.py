"""Full files of the journal and the snapshot of them: a restarted actor knows the same, and every entry is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control import snapshots
from orchestrator.control.effects import Applied
from orchestrator.control.engine import relocated
from orchestrator.control.events import Event
from orchestrator.control.journal import FILE_NAME, read_history, read_run, segments
from orchestrator.control.repair import repair
from orchestrator.control.transition import apply
from orchestrator.control.world import World as ControlWorld
from orchestrator.errors import JournalError
from orchestrator.policies.plan import TrialId
from orchestrator.simulate.replay import replay
from orchestrator.view.verify import verify
from tests.unit.orchestrator.control.states import durable_state
from tests.unit.orchestrator.control.worlds import World

T0, T1 = TrialId("t0"), TrialId("t1")


def told(run_dir: Path, num_rotations: int = 3) -> World:
    """A run whose journal was full several times."""
    world = World(run_dir)
    worker = world.attach("slot-0")
    for trial_id in (T0, T1):
        world.controller.submit(trial_id, {"lr": 0.1})
    for index in range(num_rotations):
        world.decide()
        worker.obey()
        worker.report(index, 1.0 + index)
        if index == 1:
            world.attach("slot-1")
        world.perform()
        assert world.controller.engine.rotate(max_bytes=1)
    world.controller.submit(TrialId("t2"), {})
    world.flush()
    return world


def folded(world: World) -> dict[str, object]:
    """What all entries of the journal say."""
    spec = world.controller.run.spec
    fresh = ControlWorld((spec,))
    for event in read_run(world.run_dir):
        assert isinstance(apply(fresh, relocated(event, spec)), Applied)
    return durable_state(fresh, fresh.runs[spec.run_id])


def known(world: World) -> dict[str, object]:
    return durable_state(world.controller.world, world.controller.run)


def num_applied(world: World, monkeypatch: pytest.MonkeyPatch) -> int:
    """Entries that a restarted actor applies."""
    seen: list[object] = []

    def counted(run_dir: Path, behind: int) -> list[Event]:
        seen.extend(read_run(run_dir, behind))
        return list(read_run(run_dir, behind))

    monkeypatch.setattr("orchestrator.control.engine.read_run", counted)
    world.restart()
    return len(seen)


def test_a_restarted_actor_begins_behind_the_snapshot_and_knows_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = told(tmp_path / "r")
    before = known(world)
    assert before["plan"] == folded(world)["plan"]
    total = sum(1 for _ in read_run(world.run_dir))
    assert 0 < num_applied(world, monkeypatch) < total / 3
    assert known(world) == before
    world.close()


def test_every_entry_and_every_decision_is_found_in_the_files_that_are_full(tmp_path: Path) -> None:
    world = told(tmp_path / "r")
    world.close()
    assert len(segments(world.run_dir)) == 4
    history = read_history(world.run_dir)
    assert [event.seq for event in history.entries] == list(range(1, len(history.entries) + 1))
    assert history.damage == ()
    found = replay(world.run_dir)
    assert found.num_same == len(found.decisions) > 1
    assert verify(world.run_dir)["violations"] == []


@pytest.mark.parametrize("harm", ["gone", "damaged", "other code", "moved"])
def test_without_a_snapshot_that_fits_the_whole_journal_says_the_same(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = told(tmp_path / "r")
    before, path = folded(world), world.run_dir / snapshots.FILE_NAME
    world.close()
    if harm == "gone":
        path.unlink()
    elif harm == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif harm == "other code":
        path.write_bytes(path.read_bytes().replace(b'"code": "', b'"code": "0', 1))
    else:
        world.run_dir = world.run_dir.rename(tmp_path / "elsewhere")
    total = sum(1 for _ in read_run(world.run_dir))
    assert num_applied(world, monkeypatch) == total
    after = known(world)
    for state in (before, after):
        trials = state["trials"]
        assert isinstance(trials, dict)
        for trial in trials.values():
            del trial["loss"], trial["modes"]
    assert after == before
    world.close()


def test_an_actor_that_dies_between_the_snapshot_and_the_new_file_loses_nothing(tmp_path: Path) -> None:
    world = told(tmp_path / "r", num_rotations=1)
    engine = world.controller.engine
    before = known(world)
    snapshots.save(world.controller.world, world.controller.run.spec, engine._journal.last_seq)
    world.restart()  # before the rename
    assert known(world) == before
    world.perform()
    world.controller.engine._journal.rotate()
    world.controller.engine.close()
    (world.run_dir / FILE_NAME).unlink()  # before the new file was there
    world.restart()
    assert known(world) == before
    world.perform()
    assert [event.seq for event in read_run(world.run_dir)][-1] == world.controller.engine._journal.last_seq
    world.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    world = told(tmp_path / "r")
    world.close()
    segments(world.run_dir)[1].unlink()
    with pytest.raises(JournalError, match=r"is followed by entry"):
        list(read_run(world.run_dir))
    assert any("is followed by entry" in text for text in read_history(world.run_dir).damage)


def test_a_damaged_line_of_a_full_file_is_repaired_into_one_journal(tmp_path: Path) -> None:
    world = told(tmp_path / "r")
    world.close()
    full = segments(world.run_dir)[0]
    full.write_bytes(full.read_bytes().replace(b'"kind":"ack"', b'"kind":"?ck"', 1))
    found = repair(world.run_dir)
    assert len(found.damage) == 1
    assert segments(world.run_dir) == [world.run_dir / FILE_NAME]
    assert found.kept_as is not None
    assert len(list(found.kept_as.iterdir())) == 4
    again = World(world.run_dir, start_id="s2", clock=world.clock)
    assert [report.index for report in again.trial(T0).reports] == [0, 1, 2]
    again.close()
