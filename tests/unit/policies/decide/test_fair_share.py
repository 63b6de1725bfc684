from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import DeviceId, Plan
from orchestrator.policies.snapshot import Override, Snapshot
from tests.unit.policies.builders import in_force, limits, settings, trial, world


def decide(snap: Snapshot) -> Plan:
    plan = FairShare().decide(snap)
    assert check(snap, plan) == ()
    return plan


def shares(plan: Plan) -> list[float]:
    return [row.settings.share for row in plan.allocations]


def test_shares_are_equal_whatever_was_asked_for() -> None:
    assert shares(decide(world([trial("a", start=settings(share=0.1)), trial("b")]))) == [0.5, 0.5]


def test_shares_follow_weights_inside_the_limits() -> None:
    heavy = trial("a", weight=3.0, dials=limits(shares=(0.05, 0.6)))
    plan = decide(world([heavy, trial("b")]))
    assert shares(plan) == [0.6, pytest.approx(0.4)]
    assert plan.allocations[0].binding == "max_share"
    assert plan.allocations[1].binding == "device"


def test_devices_are_divided_apart() -> None:
    other = DeviceId("cpu-1")
    rows = [trial("a"), trial("b"), trial("c", placement=(other,))]
    assert shares(decide(world(rows))) == [0.5, 0.5, 1.0]


def test_a_share_within_rounding_of_the_fair_one_is_not_moved() -> None:
    rows = [trial("a"), trial("b"), trial("c")]
    plan = in_force(rows, {"a": 0.33335, "b": 0.33331, "c": 0.33332})
    assert shares(decide(world(rows, plan=plan))) == [0.33335, 0.33331, 0.33332]
    moved = in_force(rows, {"a": 0.34, "b": 0.33, "c": 0.33})
    assert shares(decide(world(rows, plan=moved))) == [0.333333] * 3


def test_a_stale_trial_keeps_its_share() -> None:
    rows = [trial("a", is_stale=True), trial("b")]
    plan = decide(world(rows, plan=in_force(rows, {"a": 0.2, "b": 0.3})))
    assert shares(plan) == [0.2, pytest.approx(0.8)]
    assert plan.allocations[0].binding == "stale"


def test_a_trial_that_paused_itself_leaves_its_share_to_the_others() -> None:
    override = Override(number=1, generation=1, settings=settings(share=0.0), reason="memory")
    rows = [trial("a", override=override, changed_at_s=99.0), trial("b")]
    assert shares(decide(world(rows, plan=in_force(rows, {"a": 0.5, "b": 0.5})))) == [0.0, 1.0]


@pytest.mark.parametrize(("global_batch", "expected"), [(24, (12, 1)), (64, (16, 2))])
def test_a_group_of_another_size_keeps_the_global_batch(global_batch: int, expected: tuple[int, int]) -> None:
    dials = limits(batches=(8, 64), max_micro_batch=16)
    row = trial("a", dials=dials, placement=(DeviceId("cpu-0"), DeviceId("cpu-1")))
    alone = dataclasses.replace(row, start=settings(micro_batch=global_batch))
    plan = decide(world([row], plan=in_force([alone], {"a": 0.5})))
    dials_now = plan.allocations[0].settings
    assert (dials_now.micro_batch, dials_now.grad_accum) == expected
    assert dials_now.global_batch == global_batch


def test_a_negative_rest_is_refused() -> None:
    with pytest.raises(ValueError, match="pause_s=nan"):
        FairShare(pause_s=float("nan"))
