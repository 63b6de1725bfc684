"""Clocks of different machines: a rank's times are told on the clock of the policy actor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.clock import Reading, boot_id, offset_to, read_clock
from orchestrator.control.orders import Ack
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import STEP_DTYPE, unpack
from orchestrator.train.link import Outbox

SETTINGS = Settings(share=1.0, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1)


@dataclass
class Machines:
    """Two machines whose monotonic clocks began at different times, and a way between them that takes time."""

    ahead_s: float
    ways_s: list[tuple[float, float]]
    now_s: float = 1000.0
    asked: int = 0

    def here(self) -> Reading:
        return "here", self.now_s

    def ask(self) -> Reading:
        there, back = self.ways_s[min(self.asked, len(self.ways_s) - 1)]
        self.asked += 1
        self.now_s += there
        answer = ("there", self.now_s + self.ahead_s)
        self.now_s += back
        return answer


@given(
    st.floats(-1e7, 1e7),
    st.lists(st.tuples(st.floats(0.0001, 2.0), st.floats(0.0001, 2.0)), min_size=1, max_size=5),
)
def test_the_offset_is_wrong_by_half_of_the_shortest_round_trip_at_most(
    ahead_s: float, ways_s: list[tuple[float, float]]
) -> None:
    machines = Machines(ahead_s, ways_s)
    error_s = abs(offset_to(machines.ask, machines.here) - ahead_s)
    assert error_s <= min(there + back for there, back in ways_s) / 2 + 1e-6


def test_on_one_machine_there_is_no_offset_and_one_question_is_enough() -> None:
    asked = []

    def ask() -> Reading:
        asked.append(1)
        return "here", 5.0

    assert offset_to(ask, lambda: ("here", 1.0)) == 0.0
    assert len(asked) == 1
    if boot_id():
        assert offset_to(read_clock) == 0.0


def test_machines_that_do_not_say_which_they_are_are_compared() -> None:
    assert offset_to(lambda: ("", 5.0), lambda: ("", 1.0)) == 4.0


def test_what_a_rank_tells_is_on_the_clock_of_the_run() -> None:
    outbox = Outbox()
    outbox.offset_s = -900.0
    names = STEP_DTYPE.names
    assert names is not None
    for start_s in (1000.0, 1001.0):
        row = np.zeros(1, dtype=STEP_DTYPE)[0]
        row["start_s"] = start_s
        outbox.add_record(tuple(row.tolist()))
    outbox.add_ack(Ack(generation=1, settings=SETTINGS, step=0, applied_s=1000.5, switch_s=0.1))
    events = outbox.take()
    (records,) = (unpack(message) for message in events.records)
    assert records["start_s"].tolist() == [100.0, 101.0]
    (ack,) = events.acks
    assert ack.applied_s == pytest.approx(100.5)
    assert ack.switch_s == 0.1
    assert outbox.take().is_empty, "nothing is told twice"
