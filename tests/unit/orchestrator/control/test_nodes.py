"""Nodes that join, drain and leave: what the ledger holds then, and what becomes of their trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.lifecycle import TrialState
from orchestrator.control.nodes import NodeView
from orchestrator.control.orders import SlotOp, Status, StopMode
from policies.plan import TrialId
from tests.unit.orchestrator.control.worlds import DEVICE, Worker, World

A = TrialId("trial-a")
HERE = NodeView(node_id=DEVICE.node_id, num_cores=2)
OTHER = NodeView(node_id="other-node", num_cores=4)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def running(world: World) -> Worker:
    worker = world.attach("slot-0")
    world.controller.submit(A, {})
    world.decide()
    worker.obey()
    return worker


def units(world: World) -> dict[str, int]:
    return {device.device_id: device.units for device in world.controller.state.devices.values()}


def test_the_cores_of_a_node_count_as_soon_as_it_joins(world: World) -> None:
    world.controller.nodes.update((OTHER,))
    assert units(world) == {"cpu:other-no": 4}
    world.controller.nodes.update((OTHER,))
    kinds = [entry["kind"] for entry in _entries(world)]
    assert kinds.count("node") == 1, "nothing new is not written down again"


def test_a_worker_group_has_no_more_cores_than_its_node_offers(world: World) -> None:
    world.controller.nodes.update((NodeView(node_id=DEVICE.node_id, num_cores=1),))
    world.attach("slot-0")
    assert units(world)[DEVICE.device_id] == 1


def test_a_draining_node_gives_its_trial_back_with_a_commit_and_takes_no_other(world: World) -> None:
    world.controller.nodes.update((HERE,))
    worker = running(world)
    world.controller.nodes.update((NodeView(node_id=HERE.node_id, num_cores=2, is_draining=True),))
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.CHECKPOINT
    worker.finish(Status.INTERRUPTED, checkpoint="/c/5")
    trial = world.controller.state.lifecycle.trials[A]
    assert (trial.state, trial.checkpoint, trial.num_restarts) == (TrialState.QUEUED, "/c/5", 0)
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.CLOSE
    other = world.attach("slot-1")
    order = other.order()
    assert order is not None
    assert order.trial is not None
    assert order.trial.resume_from == "/c/5"


def test_a_lost_node_frees_its_shares_at_once_and_charges_no_restart(world: World) -> None:
    world.controller.nodes.update((HERE, OTHER))
    worker = running(world)
    worker.report(0)
    assert world.held() > 0
    world.controller.nodes.update((OTHER,))
    assert world.held() == 0
    assert list(units(world)) == ["cpu:other-no"]
    trial = world.controller.state.lifecycle.trials[A]
    assert (trial.state, trial.checkpoint, trial.num_restarts) == (TrialState.QUEUED, "/c/0", 0)
    assert worker.order() is None, "messages of the lost group are refused"


def test_the_slot_of_a_lost_node_serves_again_when_its_group_is_back(world: World) -> None:
    world.controller.nodes.update((HERE,))
    running(world)
    world.controller.nodes.update(())
    world.controller.nodes.update((HERE,))
    worker = world.attach("slot-0")
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.RUN


def test_a_restarted_actor_knows_the_nodes(world: World) -> None:
    world.controller.nodes.update((HERE, OTHER))
    world.controller.nodes.update((OTHER,))
    before = units(world)
    world.restart()
    assert units(world) == before
    world.controller.nodes.update((OTHER,))
    assert [entry["kind"] for entry in _entries(world)].count("node") == 3


def _entries(world: World) -> list[dict[str, object]]:
    from orchestrator.control.journal import read

    return list(read(world.run_dir / "journal.jsonl"))
