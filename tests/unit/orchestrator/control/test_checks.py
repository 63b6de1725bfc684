"""Shares are looked at while trials run; what is not real is in the status and, once, in the journal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.journal import read
from orchestrator.control.memory import CONTEXT_BYTES
from orchestrator.policies.plan import DeviceId, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.share.verification import Subject, Verdict
from tests.unit.orchestrator.control.worlds import World

T0, T1 = TrialId("t0"), TrialId("t1")
GIB = 1 << 30
GPU = DeviceView(
    device_id=DeviceId("cuda:x"), node_id="n0", kind=DeviceKind.CUDA, units=15, device_type="h", memory_bytes=100 * GIB
)


def entries(world: World) -> list[dict[str, Any]]:
    return [entry for entry in read(world.run_dir / "journal.jsonl") if entry["kind"] == "check"]


def shown(world: World, trial: int = 0) -> dict[str, dict[str, Any]]:
    status = world.status().now()
    return {check["what"]: check for check in status["trials"][trial]["checks"]}


def test_a_share_of_cores_that_is_kept_is_held_and_said_once(tmp_path: Path) -> None:
    world = World(tmp_path / "run", policy_name="static")
    worker = world.attach("slot-0")
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    world.observe()
    assert shown(world)["compute"]["verdict"] == "not observable"
    assert entries(world) == [], "what cannot be seen is no news"
    for _ in range(3):
        worker.obey(num_steps=200)  # each step uses one core, and one is granted
        world.observe()
    assert shown(world)["compute"]["verdict"] == "held"
    (entry,) = entries(world)
    assert (entry["trial_id"], entry["generation"], entry["verdict"]) == ("t0", 1, "held")
    assert (entry["expected"], entry["observed"]) == (1.0, pytest.approx(1.0))
    world.restart()  # the journal of a run with checks is read back


def test_a_share_that_uses_more_than_its_cores_is_shown_as_not_held(tmp_path: Path) -> None:
    world = World(tmp_path / "run", policy_name="fair_share")
    workers = [world.attach(f"slot-{number}") for number in range(4)]
    for number in range(4):
        world.controller.submit(TrialId(f"t{number}"), {})
    world.decide()
    for _ in range(3):
        for worker in workers:
            worker.obey(num_steps=200)
        world.controller.offer()
    world.observe()
    check = shown(world)["compute"]
    assert (check["verdict"], check["expected"], check["observed"]) == ("not held", 0.5, pytest.approx(1.0))
    assert "1.00 cores, granted 0.50 cores" in check["reason"]
    assert {entry["verdict"] for entry in entries(world)} == {"not held"}


def gpu_world(tmp_path: Path) -> World:
    return World(tmp_path / "run", enforces=("compute", "memory"), memory_cap_bytes=40 * GIB)


def seen(used: int, pid: int = 1) -> list[dict[str, Any]]:
    return [{"device_id": GPU.device_id, "processes": ((pid, used), (999, 90 * GIB))}]


def test_memory_is_compared_by_process_and_by_the_ranks_word_where_nvml_hides_it(tmp_path: Path) -> None:
    world = gpu_world(tmp_path)
    worker = world.attach("slot-0", devices=(GPU,))
    world.controller.submit(T0, {})
    world.decide()
    worker.obey()
    checks = world.controller.checks
    world.observe()
    assert "NVML shows none" in shown(world)["memory"]["reason"]
    checks.take_samples(seen(40 * GIB + CONTEXT_BYTES))
    world.observe()
    assert (shown(world)["memory"]["verdict"], shown(world)["memory"]["observed"]) == (
        "held",
        40 * GIB + CONTEXT_BYTES,
    )
    checks.take_samples(seen(50 * GIB))
    world.observe()
    assert shown(world)["memory"]["verdict"] == "not held"
    checks.take_samples([{"device_id": GPU.device_id, "processes": None}])
    world.observe()
    assert shown(world)["memory"]["verdict"] == "held", "the rank itself says 1 MiB"
    verdicts = [entry["verdict"] for entry in entries(world) if entry["what"] == "memory"]
    assert verdicts == ["held", "not held"], "each verdict once per allocation"


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, Verdict.HELD), (2.0, Verdict.NOT_HELD)])
def test_a_neighbour_that_halves_a_trials_speed_has_its_groups(tmp_path: Path, factor: float, verdict: Verdict) -> None:
    world = gpu_world(tmp_path)
    spec = world.spec  # nobody's share changes when the second comes
    limits, start = (
        dataclasses.replace(spec.limits, max_share=0.4),
        dataclasses.replace(spec.start, share=0.4),
    )
    world.controller.run.spec = dataclasses.replace(spec, limits=limits, start=start)
    first, second = (world.attach(f"slot-{number}", devices=(GPU,)) for number in range(2))
    world.controller.submit(T0, {})
    world.decide()

    def train(step_s: float) -> None:
        for _ in range(6):
            first.obey(num_steps=50, step_s=step_s)
            second.obey(num_steps=1, step_s=0.001)
            world.observe()

    train(0.02)
    known = world.trial(T0).checks
    assert known[Subject.NEIGHBOURS].verdict is Verdict.NOT_OBSERVABLE
    assert "nobody computes beside it" in known[Subject.NEIGHBOURS].reason
    world.controller.submit(T1, {})
    world.controller.admit()
    world.decide()
    train(0.02 * factor)
    check = world.trial(T0).checks[Subject.NEIGHBOURS]
    assert check.verdict is verdict, check.reason
    assert check.observed == pytest.approx(factor, rel=0.02)


def test_nothing_is_claimed_of_a_gpu_whose_mechanism_enforces_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "run", enforces=())
    worker = world.attach("slot-0", devices=(GPU,))
    world.controller.submit(T0, {})
    world.decide()
    worker.obey(num_steps=300)
    world.observe()
    assert shown(world) == {}


def test_what_processes_hold_stays_out_of_the_table_of_devices(tmp_path: Path) -> None:
    world = gpu_world(tmp_path)
    rows = world.status().take_samples(seen(GIB))
    assert "processes" not in rows[0]
    world.controller.engine.telemetry.append_devices(rows)
