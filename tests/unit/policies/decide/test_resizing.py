from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.codec import dumps, plan_from
from orchestrator.policies.conformance import check_policy
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.plan import (
    Allocation,
    DeviceId,
    Effect,
    Plan,
    Settings,
    can_split,
    diff,
    effect_of,
    on_ranks,
)
from orchestrator.policies.sample_worlds import snapshots
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import in_force, limits, measured, observation, settings, trial, world

POLICY = GoodputJoint(cooldown_s=10.0, horizon_s=600.0)
GPUS = tuple(
    DeviceView(device_id=DeviceId(f"gpu-{n}"), node_id="node", kind=DeviceKind.CUDA, units=1) for n in range(4)
)


def resizable(most: int = 4, *, max_share: float = 1.0, batch: int = 8) -> DialLimits:
    dials = limits(shares=(0.05, max_share), batches=(batch, batch))
    return dataclasses.replace(dials, min_workers=1, max_workers=most)


def on_gpus(row: TrialView, *gpus: int, restart_s: float | None = 1.0) -> TrialView:
    placement = tuple(GPUS[n].device_id for n in gpus)
    return dataclasses.replace(
        row,
        placement=placement,
        start=on_ranks(row.start, len(placement), 64),
        throughput_per_s=80.0,
        target_samples=1_000_000,
        restart_s=restart_s,
    )


def on_the_cards(*rows: TrialView, num_gpus: int = 4, now_s: float = 100.0) -> Snapshot:
    plan = in_force(rows, {row.trial_id: 1.0 for row in rows})
    return Snapshot(now_s=now_s, seed=0, plan=plan, devices=GPUS[:num_gpus], trials=rows)


def seen(*pairs: tuple[int, float]) -> TrialFit:
    """Speeds of a step of eight samples by number of ranks."""
    return measured(
        *(
            dataclasses.replace(observation(step_s, micro_batch=8 // ranks, cores=1.0), num_workers=ranks)
            for ranks, step_s in pairs
        )
    )


def decide(snap: Snapshot, policy: GoodputJoint = POLICY) -> Plan:
    plan = policy.decide(snap)
    assert check(snap, plan) == ()
    return plan


def asked(snap: Snapshot, policy: GoodputJoint = POLICY) -> dict[str, int | None]:
    return {row.trial_id: row.resize_to for row in decide(snap, policy).allocations}


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.integers(1, 16), st.integers(1, 64))
def test_another_number_of_ranks_keeps_the_global_batch_to_the_sample(
    micro: int, accum: int, ranks: int, wanted: int, most: int
) -> None:
    old = Settings(share=0.5, micro_batch=micro, grad_accum=accum, tier=Tier.BF16, num_workers=ranks)
    if not can_split(old, wanted):
        with pytest.raises(ValueError, match="a divisor of it"):
            on_ranks(old, wanted, most)
        return
    new = on_ranks(old, wanted, most)
    assert (new.num_workers, new.global_batch, new.tier, new.share) == (wanted, old.global_batch, old.tier, old.share)
    assert new.micro_batch <= most or wanted == ranks


def test_a_trial_that_may_grow_asks_for_the_free_cards() -> None:
    row = on_gpus(trial("a", dials=resizable(), fit=seen((1, 0.1))), 0)
    (allocation,) = decide(on_the_cards(row)).allocations
    assert allocation.resize_to == 2, "not to more than twice what was measured"
    assert allocation.effect is Effect.RESTART
    assert (allocation.settings.num_workers, allocation.placement) == (1, row.placement), "it trains on until then"
    assert "2 ranks instead of 1" in allocation.reason
    assert allocation.cost_s == 1.0
    assert allocation.predicted_gain is not None
    assert allocation.predicted_gain > 0.3


def test_what_was_measured_says_whether_it_pays_and_the_way_back_is_taken() -> None:
    slow = seen((1, 0.1), (2, 0.12))
    alone = on_gpus(trial("a", dials=resizable(2), fit=slow), 0)
    assert asked(on_the_cards(alone)) == {"a": None}
    grown = on_gpus(trial("a", dials=resizable(2), fit=slow), 0, 1)
    assert asked(on_the_cards(grown)) == {"a": 1}
    fast = seen((1, 0.1), (2, 0.055))
    assert asked(on_the_cards(on_gpus(trial("a", dials=resizable(2), fit=fast), 0, 1))) == {"a": None}


def test_a_restart_has_to_pay_in_the_time_that_is_left() -> None:
    row = on_gpus(trial("a", dials=resizable(2), fit=seen((1, 0.1))), 0, restart_s=30.0)
    assert asked(on_the_cards(row)) == {"a": 2}
    assert row.target_samples is not None
    nearly_done = dataclasses.replace(row, num_samples=row.target_samples - 80 * 45)
    assert asked(on_the_cards(nearly_done)) == {"a": None}


def test_cards_of_others_are_not_counted_on() -> None:
    fit = seen((1, 0.1))
    rows = [on_gpus(trial(name, dials=resizable(2), fit=fit), n) for n, name in enumerate("ab")]
    assert asked(on_the_cards(*rows, num_gpus=2)) == {"a": None, "b": None}
    assert asked(on_the_cards(*rows, num_gpus=3)) == {"a": 2, "b": None}, "one at a time"


def test_a_recent_change_is_left_alone_and_a_wish_is_repeated() -> None:
    row = on_gpus(trial("a", dials=resizable(2), fit=seen((1, 0.1)), changed_at_s=95.0), 0)
    snap = on_the_cards(row)
    assert asked(snap) == {"a": None}
    wished = [dataclasses.replace(a, resize_to=2, effect=Effect.RESTART) for a in snap.plan.allocations]
    waiting = dataclasses.replace(snap, plan=dataclasses.replace(snap.plan, allocations=tuple(wished)))
    assert asked(waiting) == {"a": 2}
    assert diff(waiting.plan, decide(waiting)) == ()
    capped = dataclasses.replace(row, limits=resizable(1))  # it could not be had
    assert asked(dataclasses.replace(waiting, trials=(capped,))) == {"a": None}


def test_on_one_node_two_ranks_share_its_cores() -> None:
    fit = measured(observation(0.1, cores=1.0), observation(0.1, cores=2.0))  # a second core brings one rank nothing
    row = dataclasses.replace(
        trial("a", dials=resizable(2), fit=fit), throughput_per_s=80.0, target_samples=1_000_000, restart_s=1.0
    )
    plan = in_force([row], {"a": 1.0})
    assert asked(world([row], plan=plan)) == {"a": 2}


def test_other_policies_and_other_trials_keep_their_ranks() -> None:
    plain = on_gpus(trial("a", fit=seen((1, 0.1))), 0)
    assert asked(on_the_cards(plain)) == {"a": None}


@pytest.mark.parametrize(
    ("wish", "dials"),
    [
        (3, resizable()),  # eight samples cannot be divided by it
        (1, resizable()),  # what it has
        (8, resizable()),
        (0, resizable()),
        (2, limits()),
        (True, resizable()),
        ("2", resizable()),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_breaks_an_invariant(wish: object, dials: DialLimits) -> None:
    row = on_gpus(trial("a", dials=dials), 0)
    snap = on_the_cards(row)
    (now,) = decide(snap).allocations
    bad = dataclasses.replace(now, resize_to=wish, effect=Effect.RESTART)  # type: ignore[arg-type]
    plan = Plan(generation=decide(snap).generation, allocations=(bad,), reason="bad")
    assert [violation.code for violation in check(snap, plan)] == ["resize_to"]


def test_a_wish_takes_a_restart() -> None:
    row = on_gpus(trial("a", dials=resizable()), 0)
    snap = on_the_cards(row)
    (now,) = decide(snap).allocations
    assert now.effect is effect_of(now.settings, now.settings)
    plan = Plan(generation=decide(snap).generation, allocations=(dataclasses.replace(now, resize_to=2),), reason="bad")
    assert [violation.code for violation in check(snap, plan)] == ["effect"]


def test_plans_without_a_wish_are_written_as_ever_and_one_with_it_comes_back() -> None:
    allocation = Allocation(
        trial_id=trial("a").trial_id, settings=settings(), placement=(), effect=Effect.NONE, reason="r"
    )
    plan = Plan(generation=decide(world([])).generation, allocations=(allocation,), reason="r")
    assert "resize_to" not in dumps(plan)
    wished = dataclasses.replace(plan, allocations=(dataclasses.replace(allocation, resize_to=2),))
    assert plan_from(json.loads(dumps(wished))) == wished


def test_goodput_joint_conforms_where_ranks_may_be_chosen() -> None:
    worlds = []
    for snap in snapshots(120):
        rows = [
            dataclasses.replace(
                row,
                limits=dataclasses.replace(row.limits, min_workers=1, max_workers=4),
                throughput_per_s=50.0,
                restart_s=1.0,
            )
            for row in snap.trials
        ]
        worlds.append(dataclasses.replace(snap, trials=tuple(rows)))
    findings = check_policy(GoodputJoint(), worlds, rests=False)
    assert findings == (), "\n".join(str(finding) for finding in findings)
