"""What the control plane calls the slots of a worker group."""

from __future__ import annotations

import pytest

from orchestrator.supervisor import SlotSpec


@pytest.mark.parametrize(
    ("num_lanes", "num_slots", "found"),
    [
        (1, 2, [("slot-0",), ("slot-1",)]),
        (2, 3, [("slot-0.0", "slot-0.1"), ("slot-1.0",)]),
        (8, 3, [("slot-0.0", "slot-0.1", "slot-0.2")]),
    ],
)
def test_a_worker_group_is_one_slot_or_one_for_each_lane(num_lanes: int, num_slots: int, found: list[object]) -> None:
    spec = SlotSpec(
        num_workers=1,
        cpus_per_worker=1.0,
        gpus_per_worker=0.0,
        environment={},
        loop_config={},
        storage_path="",
        num_lanes=num_lanes,
        num_slots=num_slots,
    )
    num_processes = -(-num_slots // num_lanes)
    assert [spec.lanes_of(f"slot-{number}") for number in range(num_processes)] == found
