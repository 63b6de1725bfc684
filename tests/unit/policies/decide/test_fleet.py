"""Where groups of ranks go: consolidated, and never more on a device than it has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.decide.fleet import Fleet, in_rank_order
from orchestrator.policies.plan import DeviceId
from orchestrator.policies.snapshot import DeviceKind, DeviceView


def fleet(*nodes: int, types: tuple[str, ...] = ()) -> Fleet:
    """Nodes of so many devices, each node of one type."""
    return Fleet(
        DeviceView(
            device_id=DeviceId(f"gpu-{node}-{index}"),
            node_id=f"node-{node}",
            kind=DeviceKind.CUDA,
            units=15,
            device_type=types[node] if types else "h200",
        )
        for node, count in enumerate(nodes)
        for index in range(count)
    )


def test_devices_are_numbered_by_node_whatever_their_order() -> None:
    made = fleet(2, 2)
    again = Fleet(reversed(made.devices))
    assert again.devices == made.devices
    assert made.node_of == [0, 0, 1, 1]
    assert made.placement((1, 2)) == ("gpu-0-1", "gpu-1-0")
    assert made.seats((DeviceId("gpu-1-0"), DeviceId("gpu-0-1"))) == (2, 1)
    assert made.seats((DeviceId("gpu-0-0"), DeviceId("gone"))) is None


def test_capacity_and_node_sizes_are_per_type() -> None:
    made = fleet(4, 2, 2, types=("a100", "t4", "t4"))
    assert made.types == ("a100", "t4")
    assert (made.capacity(0), made.capacity(1)) == (4, 4)
    assert made.node_sizes == (4, 2)


def test_a_group_goes_to_the_node_with_the_least_room_that_holds_it() -> None:
    made = fleet(4, 2, 3)
    assert made.find(0, 2) == (4, 5)
    made.take((4, 5), 1.0)
    assert made.find(0, 2) == (6, 7)
    assert made.find(0, 4) == (0, 1, 2, 3)


def test_a_group_too_large_for_a_node_takes_the_emptiest_and_ends_where_it_fits_tightly() -> None:
    made = fleet(4, 2, 4)
    seats = made.find(0, 6)
    assert seats is not None
    assert made.num_nodes(seats) == 2
    assert set(seats) >= {4, 5}, "the rest of two goes to the node of two"
    assert made.find(0, 11) is None


def test_a_group_over_nodes_keeps_off_those_it_must_not_touch() -> None:
    made = fleet(2, 2, 2)
    assert made.find(0, 4, avoid=frozenset({0})) == (2, 3, 4, 5)
    assert made.find(0, 6, avoid=frozenset({0})) is None


def test_a_fraction_goes_to_the_fullest_device_that_holds_it() -> None:
    made = fleet(3)
    made.take((1,), 0.5)
    assert made.find(0, 1, 0.5) == (1,)
    assert made.find(0, 1, 0.75) == (0,)
    made.take((1,), 0.5)
    assert made.find(0, 1, 0.5) == (0,)
    assert made.find(0, 2, 0.5) is None, "fractions are for one rank"


def test_giving_back_undoes_taking() -> None:
    made = fleet(2)
    made.take((0, 1), 1.0)
    assert (made.num_idle(0), made.find(0, 1), made.holds((0,), 0.1)) == (0, None, False)
    made.give_back((0,), 1.0)
    assert (made.num_idle(0), made.free(0), made.find(0, 1)) == (1, 1.0, (0,))


def test_a_fleet_of_none_has_room_for_none() -> None:
    made = Fleet(())
    assert (made.types, made.node_sizes, made.devices) == ((), (), ())


def test_ranks_that_stay_keep_their_order_and_come_first() -> None:
    assert in_rank_order((5, 3, 1), (1, 2, 3)) == (3, 1, 2)


@given(
    nodes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    asked=st.lists(st.tuples(st.integers(1, 6), st.sampled_from((0.25, 0.5, 1.0))), max_size=12),
)
def test_whatever_is_asked_no_device_is_given_out_twice(nodes: list[int], asked: list[tuple[int, float]]) -> None:
    made = fleet(*nodes)
    given_out = [0.0] * sum(nodes)
    for workers, share in asked:
        seats = made.find(0, workers, share)
        if seats is None:
            continue
        assert len(set(seats)) == len(seats) == workers
        assert made.holds(seats, share)
        made.take(seats, share)
        for seat in seats:
            given_out[seat] += share
    assert max(given_out) <= 1.0 + 1e-9
    assert [made.free(seat) for seat in range(len(given_out))] == pytest.approx([1 - each for each in given_out])
