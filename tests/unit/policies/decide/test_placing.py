"""From sizes to devices: who keeps its seats, who has to shrink, and what a quota does to it."""

from __future__ import annotations

import dataclasses

from orchestrator.policies.decide.candidates import Budget, Candidate, split
from orchestrator.policies.decide.fleet import Fleet
from orchestrator.policies.decide.placing import as_wished, in_order, realise, size_now, trimmed
from orchestrator.policies.decide.sizes import Size
from orchestrator.policies.plan import EMPTY_PLAN, Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, Quota, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import limits, trial

START = Settings(share=1.0, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1)


def mover_view(name: str, seats: tuple[int, ...] = (), **changes: object) -> TrialView:
    dials = dataclasses.replace(
        limits(batches=(8, 256)), can_move=True, can_pause=True, min_workers=1, max_workers=8, min_share=0.25
    )
    view = trial(name, start=START, dials=dials, placement=tuple(DeviceId(f"gpu-{seat}") for seat in seats))
    start = dataclasses.replace(START, num_workers=1)
    return dataclasses.replace(view, start=start, **changes)  # type: ignore[arg-type]


def world(*views: TrialView, num_devices: int = 8, node_size: int = 4, quotas: tuple[Quota, ...] = ()) -> Snapshot:
    """A fleet in which those with a placement run on it with the whole of each device."""
    devices = tuple(
        DeviceView(device_id=DeviceId(f"gpu-{i}"), node_id=f"n{i // node_size}", kind=DeviceKind.CUDA, units=15)
        for i in range(num_devices)
    )
    rows = tuple(
        Allocation(
            trial_id=view.trial_id,
            settings=dataclasses.replace(START, num_workers=len(view.placement)),
            placement=view.placement,
            effect=Effect.NONE,
            reason="1",
        )
        for view in views
        if view.placement
    )
    plan = Plan(generation=Generation(1), allocations=rows, reason="1") if rows else EMPTY_PLAN
    return Snapshot(now_s=100.0, seed=0, plan=plan, devices=devices, trials=views, quotas=quotas)


def parts(found: Snapshot) -> tuple[tuple[Candidate, ...], Fleet, Budget]:
    _, candidates, fleet = split(found)
    return candidates, fleet, Budget(found)


def whole(workers: int) -> Size:
    return Size(0, workers, 1.0)


A, B, C = TrialId("a"), TrialId("b"), TrialId("c")


def test_a_trial_that_keeps_its_size_keeps_its_devices_and_others_go_around_it() -> None:
    candidates, fleet, budget = parts(world(mover_view("a", (1, 2)), mover_view("b")))
    given = realise(candidates, {A: whole(2), B: whole(4)}, fleet, budget)
    assert given[A] == ((1, 2), 1.0)
    assert given[B] == ((4, 5, 6, 7), 1.0)


def test_the_largest_is_placed_first() -> None:
    candidates, fleet, budget = parts(world(mover_view("a"), mover_view("b")))
    given = realise(candidates, {A: whole(1), B: whole(4)}, fleet, budget)
    assert given[B] == ((0, 1, 2, 3), 1.0)
    assert given[A] == ((4,), 1.0)


def test_what_does_not_fit_shrinks_unless_it_must_not() -> None:
    for shrinks, expected in ((True, 3), (False, None)):
        candidates, fleet, budget = parts(world(mover_view("a", (0,)), mover_view("b"), num_devices=4))
        given = realise(candidates, {A: whole(1), B: whole(4)}, fleet, budget, shrinks=shrinks)
        assert (len(given[B][0]) if B in given else None) == expected


def test_whoever_is_not_wanted_gets_nothing_unless_it_is_pinned() -> None:
    views = (mover_view("a", (0,)), mover_view("b", (1,), is_protected=True))
    candidates, fleet, budget = parts(world(*views))
    given = realise(candidates, {}, fleet, budget)
    assert given == {B: ((1,), 1.0)}


def test_a_quota_shrinks_the_trial_of_its_user_only() -> None:
    views = (mover_view("a", user="ann"), mover_view("b", user="bob"))
    candidates, fleet, budget = parts(world(*views, quotas=(Quota(user="ann", max_devices=2.0),)))
    given = realise(candidates, {A: whole(4), B: whole(4)}, fleet, budget)
    assert (len(given[A][0]), len(given[B][0])) == (2, 4)


def test_a_node_holds_one_trial_that_spans_nodes_where_that_is_asked() -> None:
    views = (mover_view("a"), mover_view("b"))
    for one_spread, expected in ((False, {A, B}), (True, {A})):
        candidates, fleet, budget = parts(world(*views, num_devices=12, node_size=3))
        given = realise(
            candidates, {A: whole(8), B: whole(4)}, fleet, budget, one_spread_per_node=one_spread, shrinks=False
        )
        assert set(given) == expected


def test_fractions_share_a_device() -> None:
    candidates, fleet, budget = parts(
        world(mover_view("a"), mover_view("b"), mover_view("c"), num_devices=2, node_size=2)
    )
    given = realise(candidates, {A: Size(0, 1, 0.5), B: Size(0, 1, 0.5), C: whole(1)}, fleet, budget)
    assert given[A][0] == given[B][0] != given[C][0]


def test_counting_out_in_order_blocks_or_passes_over() -> None:
    wide = mover_view("a", requested=dataclasses.replace(START, num_workers=6))
    views = (wide, mover_view("b"))
    for blocks, expected in ((True, set[TrialId]()), (False, {B})):
        candidates, fleet, budget = parts(world(*views, num_devices=4))
        assert set(in_order(candidates, fleet, budget, blocks=blocks)) == expected


def test_counting_out_leaves_fleet_and_budget_as_they_were() -> None:
    view = mover_view("a", user="ann", requested=dataclasses.replace(START, num_workers=4))
    candidates, fleet, budget = parts(world(view, quotas=(Quota(user="ann", max_devices=4.0),)))
    assert in_order(candidates, fleet, budget, blocks=True) == {A: whole(4)}
    assert (fleet.num_idle(0), budget.left("ann")) == (8, 4.0)


def test_dials_as_wished_keep_the_global_batch_on_any_number_of_ranks() -> None:
    wish = dataclasses.replace(START, micro_batch=32, num_workers=4)
    candidates, fleet, _ = parts(world(mover_view("a", requested=wish)))
    for workers in (1, 2, 4, 8):
        assert as_wished(candidates[0], workers).global_batch == wish.global_batch
    assert size_now(candidates[0], fleet) is None


def test_what_was_shrunk_between_two_sizes_becomes_the_smaller_one() -> None:
    sizes = [Size(0, workers, 1.0) for workers in (2, 4, 8)]
    assert trimmed(((0, 1, 2), 1.0), 0, sizes) == ((0, 1), 1.0)
    assert trimmed(((0,), 1.0), 0, sizes) is None
    assert trimmed(((0, 1, 2, 3), 1.0), 1, sizes) is None
