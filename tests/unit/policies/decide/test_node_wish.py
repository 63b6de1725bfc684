"""Which nodes are worth their price, for trials in slots and for trials that move."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from orchestrator.policies.codec import dumps, plan_from, snapshot_from
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import EMPTY_PLAN, Generation, NodeWish, Plan, is_same, numbers
from orchestrator.policies.sample_fleets import fleet_world
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, NodeType, Snapshot, TrialView
from tests.unit.policies.builders import device, limits, measured, observation, settings, trial

JOINT = GoodputJoint()


def node_type(name: str = "spot", price: float = 1.0, **changes: object) -> NodeType:
    base = NodeType(
        name=name, kind=DeviceKind.CPU, num_devices=1, units=4, num_ranks=4, price_per_hour=price, max_nodes=4
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def waiting(count: int, dials: DialLimits | None = None) -> tuple[TrialView, ...]:
    return tuple(trial(f"w{index}", placement=(), start=settings(), dials=dials) for index in range(count))


def slots(
    *types: NodeType, running: int = 0, wait: int = 0, now_s: float = 1000.0, plan: Plan = EMPTY_PLAN, **rest: object
) -> Snapshot:
    """Trials that run on the nodes of the types in turn, up to four on each, and others that wait."""
    nodes = [node for each in types for node in each.nodes]
    devices = [dataclasses.replace(device(f"cpu-{node}", units=4), node_id=node) for node in nodes]
    rows = tuple(
        dataclasses.replace(trial(f"r{index}", placement=(devices[index // 4].device_id,)), start=settings(0.25))
        for index in range(running)
    )
    world = Snapshot(
        now_s=now_s,
        seed=0,
        plan=plan,
        devices=tuple(sorted(devices, key=lambda each: each.device_id)),
        trials=rows,
        node_types=tuple(sorted(types, key=lambda each: each.name)),
        waiting=tuple(dataclasses.replace(row, start=settings()) for row in waiting(wait)),
    )
    return dataclasses.replace(world, **rest)  # type: ignore[arg-type]


def decide(world: Snapshot, policy: GoodputJoint = JOINT) -> Plan:
    plan = policy.decide(world)
    assert check(world, plan) == ()
    return plan


def after(world: Snapshot, plan: Plan, seconds: float = 1.0, **changes: object) -> Snapshot:
    return dataclasses.replace(world, plan=plan, now_s=world.now_s + seconds, **changes)  # type: ignore[arg-type]


def test_nodes_are_asked_for_while_nothing_runs_yet() -> None:
    plan = decide(slots(node_type(), wait=4))
    assert numbers(plan.nodes) == {"spot": 1}, "four trials fit on one node"
    (wish,) = plan.nodes
    assert wish.cost_per_hour == 1.0
    assert "asks for 1" in wish.reason


def test_as_many_as_there_are_trials_for_and_no_more() -> None:
    assert numbers(decide(slots(node_type(), wait=8)).nodes) == {"spot": 2}
    assert numbers(decide(slots(node_type(), wait=9)).nodes) == {"spot": 3}, "alone it is as fast as four that share"
    assert numbers(decide(slots(node_type(), wait=9), GoodputJoint(min_return=1.0)).nodes) == {"spot": 2}
    assert numbers(decide(slots(node_type(), wait=99)).nodes) == {"spot": 4}, "max_nodes"


def test_where_nobody_waits_another_node_is_worth_nothing() -> None:
    plan = decide(slots(node_type(nodes=("a",)), running=4))
    assert numbers(plan.nodes) == {"spot": 1}
    assert "one more would bring 0.00" in plan.nodes[0].reason


def test_the_better_return_is_asked_for_first() -> None:
    dear = node_type("dear", 3.0)
    assert numbers(decide(slots(node_type(), dear, wait=4)).nodes) == {"dear": 0, "spot": 1}
    fast = node_type("fast", 3.0, speed=10.0)
    plan = decide(slots(node_type(device_type="slow"), dataclasses.replace(fast, device_type="quick"), wait=4))
    assert numbers(plan.nodes) == {"fast": 1, "spot": 0}
    stays = node_type("stays", is_spot=False)
    plan = decide(slots(node_type("a-spot", is_spot=True), stays, wait=4))
    assert numbers(plan.nodes) == {"a-spot": 0, "stays": 1}, "at the same return one that stays"


def test_the_budget_bounds_what_is_asked_for_and_is_kept_at_once_when_it_falls() -> None:
    world = slots(node_type(), wait=12, max_cost_per_hour=2.5)
    plan = decide(world)
    assert numbers(plan.nodes) == {"spot": 2}
    assert "beyond 2.5" in decide(after(world, plan)).nodes[0].reason
    poorer = decide(after(world, plan, max_cost_per_hour=1.0))
    assert numbers(poorer.nodes) == {"spot": 1}
    assert "the budget of 1" in poorer.nodes[0].reason


def test_a_node_that_nobody_needs_any_more_is_let_go_after_the_cooldown() -> None:
    both = node_type(nodes=("a", "b"))
    world = slots(both, running=5)
    plan = decide(world)
    assert numbers(plan.nodes) == {"spot": 2}, "just begun"
    fewer = slots(both, running=4, plan=plan, now_s=world.now_s + 60)
    assert numbers(decide(fewer).nodes) == {"spot": 2}, "still within the cooldown"
    later = decide(dataclasses.replace(fewer, now_s=world.now_s + 121))
    assert numbers(later.nodes) == {"spot": 1}
    assert "keeps 1" in later.nodes[0].reason
    assert later.nodes[0].grows is False


def test_the_last_node_stays_while_trials_could_use_it() -> None:
    dear = node_type("dear", 100.0, nodes=("a",))
    tiny = node_type("tiny", 0.1, max_nodes=1, device_type="tiny", speed=0.01)
    world = slots(dear, tiny, running=1)
    plan = decide(after(world, decide(world), seconds=1000.0))
    assert numbers(plan.nodes)["dear"] == 1


def test_a_cheaper_node_that_does_the_work_is_asked_for_and_the_dearer_goes_when_it_is_there() -> None:
    dear, cheap = node_type("dear", 3.0, nodes=("a",)), node_type("cheap", 1.0)
    world = slots(dear, cheap, running=4)
    plan = decide(world)
    assert numbers(plan.nodes) == {"cheap": 1, "dear": 1}
    assert "does the work of one dear" in plan.nodes[0].reason
    later = decide(after(world, plan, seconds=1000.0))
    assert numbers(later.nodes) == {"cheap": 1, "dear": 1}, "it has not come yet"
    there = (dataclasses.replace(cheap, nodes=("b",)), dear)
    assert numbers(decide(after(world, plan, seconds=1000.0, node_types=there)).nodes) == {"cheap": 1, "dear": 0}


def test_a_wish_rests_in_an_unchanged_world() -> None:
    world = slots(node_type(), node_type("other", 2.0, units=16, num_ranks=16), wait=11)
    plan = decide(world)
    for _ in range(5):
        world = after(world, plan, seconds=500.0)
        again = decide(world)
        assert is_same(plan, dataclasses.replace(again, generation=plan.generation))
        plan = again


def test_what_is_measured_counts() -> None:
    flat = measured(*(observation(1.0, cores=cores) for cores in (1.0, 2.0, 4.0)))
    linear = measured(*(observation(4.0 / cores, cores=cores) for cores in (1.0, 2.0, 4.0)))

    def wish(fit: object) -> int:
        world = slots(node_type(nodes=("a",)), running=4, wait=1)
        rows = tuple(dataclasses.replace(row, fit=fit) for row in world.trials)  # type: ignore[arg-type]
        return numbers(decide(dataclasses.replace(world, trials=rows)).nodes)["spot"]

    assert wish(linear) == 2, "alone on a node it is as fast as four that share one"
    assert wish(flat) == 1, "it would be no faster there than beside others, and pay for a whole node"


def test_free_nodes_are_taken_and_kept() -> None:
    own = node_type("own", 0.0)
    plan = decide(slots(own, wait=4))
    assert numbers(plan.nodes) == {"own": 1}
    kept = decide(after(slots(dataclasses.replace(own, nodes=("a",))), plan, seconds=1000.0))
    assert numbers(kept.nodes) == {"own": 1}


def test_a_trial_of_several_ranks_needs_all_of_them() -> None:
    wide = dataclasses.replace(trial("w", placement=()), start=dataclasses.replace(settings(), num_workers=2))
    one = node_type(num_ranks=1, units=1)
    world = slots(one, waiting=(wide,))
    assert numbers(decide(world).nodes) == {"spot": 2}


def test_nodes_of_no_type_are_used_first() -> None:
    world = slots(node_type(), wait=2)
    own = DeviceView(device_id=device("own").device_id, node_id="own", kind=DeviceKind.CPU, units=4)
    assert numbers(decide(dataclasses.replace(world, devices=(own,))).nodes) == {"spot": 0}


def test_trials_on_a_node_that_leaves_count_as_waiting() -> None:
    leaving = node_type(nodes=("b",), leaving=("a",))
    rows = slots(node_type(nodes=("a",)), running=4)
    world = slots(leaving, devices=rows.devices, trials=rows.trials)
    assert numbers(decide(world).nodes) == {"spot": 1}, "they fit on the node that stays"


def test_a_policy_without_wishes_changes_none() -> None:
    wish = NodeWish(node_type="spot", num_nodes=1, cost_per_hour=1.0, reason="r", since_s=0.0)
    old = Plan(generation=Generation(1), allocations=(), reason="r", nodes=(wish,))
    assert is_same(old, dataclasses.replace(old, nodes=()))
    assert not is_same(old, dataclasses.replace(old, nodes=(dataclasses.replace(wish, num_nodes=2),)))
    assert is_same(old, dataclasses.replace(old, nodes=(dataclasses.replace(wish, reason="other"),)))


def test_wishes_survive_the_journal_and_old_plans_have_none() -> None:
    world = slots(node_type(nodes=("a",)), running=2, wait=4, max_cost_per_hour=3.0)
    assert snapshot_from(json.loads(dumps(world))) == world
    plan = decide(world)
    assert plan_from(json.loads(dumps(plan))) == plan
    assert "nodes" not in dumps(EMPTY_PLAN)
    old = json.loads(dumps(EMPTY_PLAN))
    assert plan_from(old).nodes == ()
    assert "node_types" not in dumps(slots())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_nodes": 9}, "allowed: 0 to 4"),
        ({"num_nodes": 4.0}, "allowed: 0 to 4"),
        ({"node_type": "other"}, "each once"),
        ({"since_s": float("nan")}, "finite numbers"),
        ({"grows": 1}, "True or False"),
        ({"reason": ""}, "the reason"),
        ({"num_nodes": 4}, "allowed: 2.5"),
    ],
)
def test_an_illegal_wish_is_named(changes: dict[str, object], says: str) -> None:
    world = slots(node_type(), wait=1, max_cost_per_hour=2.5)
    plan = JOINT.decide(world)
    wrong = dataclasses.replace(plan, nodes=(dataclasses.replace(plan.nodes[0], **changes),))  # type: ignore[arg-type]
    assert [violation.code for violation in check(world, wrong)] == ["nodes"]
    assert says in check(world, wrong)[0].text
    assert "tuple of NodeWish" in check(world, dataclasses.replace(plan, nodes=[1]))[0].text  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"min_return": 0.0}, {"min_return": 1.5}, {"node_cooldown_s": -1.0}])
def test_a_parameter_out_of_range_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"allowed"):
        GoodputJoint(**changes)  # type: ignore[arg-type]


# Trials that move.


@settings_of(max_examples=20)
@given(st.integers(0, 200))
def test_wishes_for_fleets_are_legal_and_come_to_rest(seed: int) -> None:
    world = fleet_world(seed)
    kind = world.devices[0] if world.devices else None
    types: tuple[NodeType, ...] = (
        node_type("a", 1.0, kind=DeviceKind.CUDA, num_devices=2, units=15, num_ranks=2, max_nodes=2),
        node_type("b", 5.0, kind=DeviceKind.CUDA, num_devices=4, units=15, num_ranks=4, max_nodes=2),
    )
    if kind is not None:
        types = tuple(dataclasses.replace(each, device_type=kind.device_type) for each in types)
    world = dataclasses.replace(world, node_types=types, max_cost_per_hour=7.0)
    plan = decide(world)
    again = decide(dataclasses.replace(world, plan=dataclasses.replace(world.plan, nodes=plan.nodes)))
    assert numbers(again.nodes) == numbers(plan.nodes)


def test_trials_that_move_get_the_nodes_that_they_can_use() -> None:
    dials = dataclasses.replace(limits(can_pause=True, batches=(8, 8)), can_move=True, min_workers=1, max_workers=1)
    gpu = node_type("gpu", 1.0, kind=DeviceKind.CUDA, units=15, num_ranks=1, max_nodes=8)
    rows = tuple(dataclasses.replace(row, start=settings(1.0)) for row in waiting(3, dials))
    world = slots(gpu, trials=rows)
    plan = decide(world)
    assert numbers(plan.nodes) == {"gpu": 3}
    assert numbers(decide(after(world, plan)).nodes) == {"gpu": 3}
    fewer = after(world, plan, seconds=500.0, trials=rows[:1])
    assert numbers(decide(fewer).nodes) == {"gpu": 1}
