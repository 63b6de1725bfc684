"""Nodes that join, drain and leave: what the ledger holds then, and what becomes of their trials."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from orchestrator.control.nodes import NodeOrder, NodeView
from orchestrator.control.orders import SlotOp, Status, StopMode
from orchestrator.control.spec import RunSpec
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import TrialId
from orchestrator.view.explain import explain, render
from orchestrator.view.frame import node_texts
from tests.unit.orchestrator.control.worlds import DEVICE, SPOT, Worker, World

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
    return {device.device_id: device.units for device in world.controller.world.devices.values()}


def test_the_cores_of_a_node_count_as_soon_as_it_joins(world: World) -> None:
    world.controller.take_nodes((OTHER,))
    assert units(world) == {"cpu:other-no": 4}
    world.controller.take_nodes((OTHER,))
    kinds = [entry["kind"] for entry in _entries(world)]
    assert kinds.count("node") == 1, "nothing new is not written down again"


def test_a_worker_group_has_no_more_cores_than_its_node_offers(world: World) -> None:
    world.controller.take_nodes((NodeView(node_id=DEVICE.node_id, num_cores=1),))
    world.attach("slot-0")
    assert units(world)[DEVICE.device_id] == 1


def test_a_draining_node_gives_its_trial_back_with_a_commit_and_takes_no_other(world: World) -> None:
    world.controller.take_nodes((HERE,))
    worker = running(world)
    world.controller.take_nodes((NodeView(node_id=HERE.node_id, num_cores=2, is_draining=True),))
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.CHECKPOINT
    worker.finish(Status.INTERRUPTED, checkpoint="/c/5")
    trial = world.trial(A)
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
    world.controller.take_nodes((HERE, OTHER))
    worker = running(world)
    worker.report(0)
    assert world.held() > 0
    world.controller.take_nodes((OTHER,))
    assert world.held() == 0
    assert list(units(world)) == ["cpu:other-no"]
    trial = world.trial(A)
    assert (trial.state, trial.checkpoint, trial.num_restarts) == (TrialState.QUEUED, "/c/0", 0)
    assert worker.order() is None, "messages of the lost group are refused"


def test_the_slot_of_a_lost_node_serves_again_when_its_group_is_back(world: World) -> None:
    world.controller.take_nodes((HERE,))
    running(world)
    world.controller.take_nodes(())
    world.controller.take_nodes((HERE,))
    worker = world.attach("slot-0")
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.RUN


def test_a_restarted_actor_knows_the_nodes(world: World) -> None:
    world.controller.take_nodes((HERE, OTHER))
    world.controller.take_nodes((OTHER,))
    before = units(world)
    world.restart()
    assert units(world) == before
    world.controller.take_nodes((OTHER,))
    assert [entry["kind"] for entry in _entries(world)].count("node") == 3


def _entries(world: World) -> list[dict[str, object]]:
    from orchestrator.control.journal import read

    return list(read(world.run_dir / "journal.jsonl"))


# Nodes that the policy wishes for.


def node(name: str, num_cores: int = 2, **changes: bool) -> NodeView:
    return NodeView(node_id=name, num_cores=num_cores, node_type="spot", **changes)


@pytest.fixture
def priced(tmp_path: Path) -> World:
    return World(tmp_path / "run", policy_name="goodput_joint", node_types=(SPOT,))


def test_a_wish_is_made_before_anything_runs_and_is_in_the_journal(priced: World) -> None:
    assert priced.node_order() == NodeOrder(wanted={}, released=()), "no trial, no wish"
    priced.decide()
    priced.controller.submit(A, {})
    priced.decide()
    assert priced.node_order() == NodeOrder(wanted={"spot": 1}, released=())
    (entry,) = [entry for entry in _entries(priced) if entry["kind"] == "plan"]
    (wish,) = entry["plan"]["nodes"]  # type: ignore[index]
    assert (wish["num_nodes"], wish["cost_per_hour"]) == (1, 0.5)
    assert "asks for 1" in wish["reason"]
    priced.decide()
    assert len([entry for entry in _entries(priced) if entry["kind"] == "plan"]) == 1, "an unchanged wish is not news"


def test_no_more_is_wished_for_than_may_run_at_a_time(priced: World) -> None:
    for number in range(40):
        priced.controller.submit(TrialId(f"trial-{number}"), {})
    priced.decide()
    assert priced.node_order().wanted == {"spot": 2}, "four at a time, two ranks on a node"


def test_a_restarted_actor_still_wants_what_it_wanted(priced: World) -> None:
    priced.controller.submit(A, {})
    priced.decide()
    priced.controller.take_nodes((node("n1"), node("n2")))
    priced.controller.admit()
    before = priced.node_order()
    assert before.released != ()
    priced.restart()
    assert priced.node_order() == before


def test_the_emptiest_node_is_let_go_with_a_commit_and_taken_back_when_wanted(priced: World) -> None:
    priced.controller.take_nodes((node(DEVICE.node_id), node("idle")))
    worker = priced.attach("slot-0")
    priced.controller.submit(A, {})
    priced.decide()
    worker.obey()
    priced.clock.advance(1000.0)
    priced.decide()
    assert priced.node_order().wanted == {"spot": 1}
    priced.controller.admit()
    assert priced.node_order().released == ("idle",)
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.NONE, "the trial on the other node goes on"
    for number in range(3):
        priced.controller.submit(TrialId(f"more-{number}"), {})
    priced.clock.advance(1000.0)
    priced.decide()
    assert priced.node_order().wanted == {"spot": 2}
    priced.controller.admit()
    assert priced.node_order().released == ()
    states = [entry["state"] for entry in _entries(priced) if entry.get("node_id") == "idle"]
    assert states == ["joined", "released", "joined"]


def test_the_trials_of_a_node_that_is_let_go_commit_and_its_slots_close(priced: World) -> None:
    priced.controller.take_nodes((node(DEVICE.node_id),))
    worker = priced.attach("slot-0")
    priced.controller.submit(A, {})
    priced.decide()
    worker.obey()
    (wish,) = priced.controller.run.wishes
    priced.controller.run.wishes = (dataclasses.replace(wish, num_nodes=0),)
    priced.controller.admit()
    order = worker.order()
    assert order is not None
    assert order.stop is StopMode.CHECKPOINT
    worker.finish(Status.INTERRUPTED, checkpoint="/c/5")
    order = worker.order()
    assert order is not None
    assert order.op is SlotOp.CLOSE
    late = priced.attach("slot-1")
    priced.controller.admit()
    order = late.order()
    assert order is not None
    assert order.op in {SlotOp.CLOSE, SlotOp.RUN}
    assert order.stop is StopMode.CHECKPOINT or order.op is SlotOp.CLOSE, "one that was on its way there leaves too"


def test_the_status_says_what_is_there_wanted_and_paid_for(priced: World) -> None:
    priced.controller.take_nodes((node("n1"), node("n2")))
    priced.controller.submit(A, {})
    priced.decide()
    (shown,) = priced.status().now()["nodes"]
    assert (shown["num_nodes"], shown["num_wished"], shown["cost_per_hour"]) == (2, 2, 1.0)
    priced.clock.advance(1000.0)
    priced.decide()
    priced.controller.admit()
    (shown,) = priced.status().now()["nodes"]
    assert (shown["num_nodes"], shown["num_leaving"], shown["num_wished"], shown["cost_per_hour"]) == (2, 1, 1, 1.0)
    priced.controller.take_nodes(())
    (shown,) = priced.status().now()["nodes"]
    assert (shown["num_nodes"], shown["cost_per_hour"]) == (0, 0.0)
    (text,) = node_texts(priced.status().now())
    assert text.startswith("nodes spot (spot): 0 there, 1 wanted, ")


def test_explain_shows_the_wish_with_its_reason_and_price(priced: World) -> None:
    priced.controller.submit(A, {})
    priced.decide()
    answer = explain(priced.run_dir, 1)
    (wish,) = answer["nodes"]
    assert (wish["node_type"], wish["before"], wish["num_nodes"], wish["cost_per_hour"]) == ("spot", None, 1, 0.5)
    assert "nodes spot: 1, 0.5" in render(answer)
    assert "; 1 nodes spot" in render(explain(priced.run_dir, None))


def test_a_policy_without_wishes_lets_no_node_go(tmp_path: Path) -> None:
    world = World(tmp_path / "run", node_types=(SPOT,))
    world.controller.take_nodes((node("n1"),))
    world.controller.submit(A, {})
    world.decide()
    world.controller.admit()
    assert world.node_order() == NodeOrder(wanted={}, released=())


def test_a_run_file_without_node_types_makes_the_snapshots_of_before(world: World) -> None:
    world.attach("slot-0")
    world.controller.submit(A, {})
    world.controller.submit(TrialId("trial-b"), {})
    snapshot = world.snapshot()
    assert snapshot is not None
    assert (snapshot.node_types, snapshot.waiting) == ((), ())
    spec = world.controller.run.spec
    assert RunSpec.from_jsonable(json.loads(json.dumps(spec.to_jsonable()))) == spec
    old = {k: v for k, v in spec.to_jsonable().items() if k not in {"node_types", "max_cost_per_hour", "max_running"}}
    assert RunSpec.from_jsonable(old).node_types == ()


def test_node_types_survive_the_journal(priced: World) -> None:
    spec = priced.controller.run.spec
    assert RunSpec.from_jsonable(json.loads(json.dumps(spec.to_jsonable()))) == spec
