"""What the ledger adds to an observation: nodes, the type of device, and what others hold beside the trial."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.control.decisions import completed
from orchestrator.control.events import NodeChanged
from orchestrator.policies import dumps, snapshot_from
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, TrialFit, update
from orchestrator.policies.plan import Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.sample_worlds import snapshot
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.policies.tier import Tier
from tests.unit.orchestrator.control.books import Books
from tests.unit.orchestrator.control.worlds import World

SEEN = Observation(
    cores=1.0, tier=Tier.FP32, micro_batch=8, grad_accum=1, num_workers=2, num_steps=5, step_s=0.1, sync_s=0.01
)


def gpu(name: str, node_id: str, device_type: str = "h200", speed: float = 1.0) -> DeviceView:
    return DeviceView(
        device_id=DeviceId(name),
        node_id=node_id,
        kind=DeviceKind.CUDA,
        units=15,
        device_type=device_type,
        speed=speed,
    )


def books_with(devices: tuple[DeviceView, ...], held: dict[str, tuple[tuple[str, ...], float]]) -> Books:
    """A run in which every trial has applied its share of its devices."""
    books = Books()
    books.set_devices(devices)
    rows = []
    for name, (placement, share) in sorted(held.items()):
        places = tuple(DeviceId(each) for each in placement)
        books.open_line(TrialId(name), places)
        settings = Settings(share=share, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=len(places))
        rows.append(
            Allocation(trial_id=TrialId(name), settings=settings, placement=places, effect=Effect.NONE, reason="1")
        )
    books.commit(Plan(generation=Generation(1), allocations=tuple(rows), reason="1"))
    for name in books.offer():
        books.acknowledge(name, 1)
    return books


def seen_by(books: Books) -> tuple[Observation, ...]:
    return completed(books.world, books.run, books.run.trials[TrialId("mine")], (SEEN,))


def test_ranks_on_two_nodes_of_two_types_beside_another_trial() -> None:
    devices = (gpu("a", "n0"), gpu("b", "n1", "t4", speed=0.3))
    books = books_with(devices, {"mine": (("a", "b"), 0.4), "other": (("b",), 0.6)})
    (seen,) = seen_by(books)
    assert (seen.num_nodes, seen.device_type) == (2, "t4"), "a step takes as long as its slowest rank"
    assert seen.crowd_share == pytest.approx(0.6)
    assert dataclasses.replace(seen, num_nodes=1, device_type="", crowd_share=0.0) == SEEN


def test_own_ranks_on_a_device_are_no_crowd() -> None:
    books = books_with((gpu("a", "n0"),), {"mine": (("a", "a"), 0.4)})
    (seen,) = seen_by(books)
    assert (seen.num_nodes, seen.crowd_share) == (1, 0.0)


def test_a_device_that_has_left_is_passed_over() -> None:
    books = books_with((gpu("a", "n0"), gpu("b", "n1")), {"mine": (("a", "b"), 1.0)})
    books.happen(NodeChanged(node_id="n1", state="left", num_cores=0))
    assert [seen.num_nodes for seen in seen_by(books)] == [1]
    books.happen(NodeChanged(node_id="n0", state="left", num_cores=0))
    assert seen_by(books) == (SEEN,)


def test_a_live_fit_knows_what_was_beside_each_trial(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.controller.submit(TrialId("a"), {"depth": 2})
    world.controller.submit(TrialId("b"), {"depth": 2})
    workers = [world.attach("s0"), world.attach("s1")]
    for _ in range(4):
        world.decide()
        for worker in workers:
            worker.obey()
    world.decide()
    crowds = {
        cell.crowd for trial in world.controller.run.trials.values() for cell in (trial.fit or NOTHING_FITTED).cells
    }
    assert 2 in crowds, "the other half of the device"


def test_a_snapshot_of_before_these_fields_reads_as_it_was() -> None:
    """Fields at their defaults are not written, so what an old journal says and what is said today are the same."""
    world = snapshot(3, num_trials=2, num_devices=1)
    plain = update(TrialFit(), [dataclasses.replace(SEEN, num_workers=1, sync_s=None)])
    trial = dataclasses.replace(world.trials[0], fit=plain)
    old = to_jsonable(dataclasses.replace(world, trials=(trial, *world.trials[1:])))
    assert "crowd" not in str(old["trials"][0]["fit"])
    assert dumps(snapshot_from(old)) == dumps(old)
