"""Who may start on GPUs: as many as the knee and memory allow, and a trial under which a GPU failed runs alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.control.orders import SlotHello
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from tests.unit.orchestrator.control.worlds import World

GPU = DeviceView(
    device_id=DeviceId("cuda:x"),
    node_id="n",
    kind=DeviceKind.CUDA,
    units=15,
    device_type="H200",
    memory_bytes=140 << 30,
)


def attach(world: World, slot_id: str, device: DeviceView = GPU, warm_peak_bytes: int | None = None) -> int:
    world.num_attached += 1
    hello = SlotHello(
        slot_id=slot_id,
        pids=(world.num_attached,),
        placement=(device.device_id,),
        devices=(device,),
        enforced_by="sm_groups",
        enforcement="",
        warm_peak_bytes=warm_peak_bytes,
    )
    return world.controller.attach(hello)


def running(world: World) -> list[str]:
    return [str(trial.trial_id) for trial in world.controller.run.running()]


def with_trials(tmp_path: Path, count: int, device: DeviceView = GPU, warm_peak_bytes: int | None = None) -> World:
    (tmp_path / "run").mkdir()
    world = World(tmp_path / "run")
    for number in range(count):
        world.controller.submit(TrialId(f"t{number}"), {"width": 8})
    for number in range(count):
        attach(world, f"slot-{number}", device, warm_peak_bytes)
    return world


def know_peak(world: World, peak_bytes: int) -> None:
    trial = world.trial(TrialId("t0"))
    world.controller.admission._peaks[world.controller.run.spec.shape(trial.params)] = peak_bytes
    world.controller.settle()


def test_one_trial_at_a_time_until_its_memory_is_known(tmp_path: Path) -> None:
    world = with_trials(tmp_path, 5)
    assert running(world) == ["t0"]
    know_peak(world, 4 << 30)
    assert running(world) == ["t0", "t1", "t2", "t3"], "four, where the search for the knee begins"


def test_what_a_slot_took_to_warm_up_foretells_the_memory_of_the_first_trials(tmp_path: Path) -> None:
    world = with_trials(tmp_path, 5, warm_peak_bytes=20 << 30)
    assert running(world) == ["t0", "t1", "t2"], "twice that each, of 140 GiB with five contexts and some to spare"
    know_peak(world, 4 << 30)
    assert running(world) == ["t0", "t1", "t2", "t3"], "what was measured counts for more"


def test_a_large_trial_is_not_joined_by_another(tmp_path: Path) -> None:
    world = with_trials(tmp_path, 2)
    know_peak(world, 90 << 30)
    assert running(world) == ["t0"]


def test_one_that_waits_at_its_rung_says_nothing_of_what_trials_make_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last speed is that of before, and the others have its part of the card meanwhile."""
    world = with_trials(tmp_path, 2)
    know_peak(world, 4 << 30)
    seen: list[list[float | None]] = []
    view = SimpleNamespace(is_stale=False, throughput_per_s=10.0, memory_bytes=1)
    for trial_id in ("t0", "t1"):
        window = SimpleNamespace(view=lambda _now_s: view)
        monkeypatch.setattr(world.trial(TrialId(trial_id)), "window", window)
    monkeypatch.setattr(world.controller.run.rungs, "is_waiting", lambda trial: trial.trial_id == "t1")
    monkeypatch.setattr(
        world.controller.admission._knee, "observe", lambda _now_s, _key, rates, *_rest: seen.append(rates)
    )
    world.controller.admission.observe(world.clock.now_s())
    assert seen == [[10.0, None]]


OTHER = replace(GPU, device_id=DeviceId("cuda:y"))


def test_trials_spread_over_the_gpus_though_slots_opened_on_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    world = World(tmp_path / "run")
    for number in range(10):
        attach(world, f"slot-{number}", GPU if number < 5 else OTHER)
    for number in range(10):
        world.controller.submit(TrialId(f"t{number}"), {"width": 8})
    know_peak(world, 4 << 30)
    run = world.controller.run
    assert [run.trials[TrialId(f"t{number}")].slot_id for number in range(3)] == ["slot-0", "slot-5", "slot-1"]
    assert len(running(world)) == 8, "four on each GPU"


def test_a_trial_of_two_ranks_takes_a_part_of_two_gpus(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    world = World(tmp_path / "run")
    placement = (GPU.device_id, OTHER.device_id)
    for number in range(5):
        hello = SlotHello(
            slot_id=f"slot-{number}",
            placement=placement if number % 2 == 0 else placement[::-1],
            devices=(GPU, OTHER),
            enforced_by="sm_groups",
            enforcement="",
        )
        world.controller.attach(hello)
        world.controller.submit(TrialId(f"t{number}"), {"width": 8})
    world.trial(TrialId("t1")).num_workers = 2
    assert running(world) == ["t0"]
    know_peak(world, 4 << 30)
    assert running(world) == ["t0", "t1", "t2", "t3"], "four ranks on each GPU, where the search for the knee begins"


def test_cores_are_given_as_ever(tmp_path: Path) -> None:
    cpu = replace(GPU, device_id=DeviceId("cpu:x"), kind=DeviceKind.CPU)
    assert running(with_trials(tmp_path, 3, cpu)) == ["t0", "t1", "t2"]


def test_a_trial_under_which_a_gpu_failed_runs_alone(tmp_path: Path) -> None:
    world = with_trials(tmp_path, 3)
    know_peak(world, 1 << 30)
    state = world.controller.run
    assert running(world) == ["t0", "t1", "t2"]
    slots = {trial.trial_id: trial.slot_id for trial in state.running()}
    for slot_id in slots.values():
        assert slot_id is not None
        world.controller.suspect(slot_id, world.controller.world.slots[slot_id].epoch, "unspecified launch failure")
    for slot_id in slots.values():
        assert slot_id is not None
        attach(world, slot_id)
    assert len(running(world)) == 1, "nobody beside a suspect"
    suspects = [trial for trial in state.trials.values() if trial.is_suspect]
    assert [trial.trial_id for trial in suspects] == ["t0", "t1", "t2"]
    assert "the GPU failed under it" in " ".join(suspects[0].story)


def test_an_old_epoch_suspects_nobody(tmp_path: Path) -> None:
    world = with_trials(tmp_path, 1)
    world.controller.suspect("slot-0", -1, "old news")
    world.controller.suspect("slot-9", 1, "no such slot")
    assert not world.trial(TrialId("t0")).is_suspect


def test_a_file_of_found_numbers_that_is_none_is_passed_over(tmp_path: Path) -> None:
    for text in ("", "[]", '{"a": 0, "b": true, "c": "x"}', "{"):
        (tmp_path / "knees.json").write_text(text)
        (tmp_path / "run").mkdir(exist_ok=True)
        assert World(tmp_path / "run").controller.admission._knee.found == {}
