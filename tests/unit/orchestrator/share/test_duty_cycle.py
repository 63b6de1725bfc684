from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.share.duty_cycle import BURST_S, DutyCycle, num_threads


class Machine:
    """A process on fake cores: computing takes wall and CPU time, sleeping only wall time, and a bit too much."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s, self.used_s, self.slept_s = 100.0, 7.0, 0.0
        self.oversleep_s = oversleep_s
        self.wakes_after_s: float | None = None

    def compute(self, cpu_s: float, cores: float = 1.0) -> None:
        self.used_s += cpu_s
        self.now_s += cpu_s / cores

    def idle(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, seconds: float) -> None:
        if self.wakes_after_s is not None:
            seconds = min(seconds, self.wakes_after_s)
        self.now_s += seconds + self.oversleep_s
        self.slept_s += seconds + self.oversleep_s

    def duty(self, amount: float) -> DutyCycle:
        duty = DutyCycle(lambda: self.now_s, lambda: self.used_s, self.wait)
        duty.set_amount(amount)
        return duty


@given(
    amount=st.floats(0.1, 4.0),
    cores=st.integers(1, 4),
    steps=st.lists(st.floats(0.001, 0.2), min_size=50, max_size=200),
    oversleep_s=st.sampled_from([0.0, 0.0001, 0.003]),
)
def test_cpu_time_never_exceeds_the_rate_and_comes_close_to_it(
    amount: float, cores: int, steps: list[float], oversleep_s: float
) -> None:
    machine = Machine(oversleep_s)
    duty = machine.duty(amount)
    for cpu_s in steps:
        machine.compute(cpu_s, cores)
        duty.hold_back()
    wall_s, used_s = machine.now_s - 100.0, machine.used_s - 7.0
    rate = min(amount, cores)
    assert used_s <= amount * wall_s + 0.001 * amount
    assert used_s >= rate * wall_s - amount * (max(steps) / amount + BURST_S + oversleep_s)
    assert duty.charged_s == pytest.approx(used_s)


@pytest.mark.parametrize("amount", [0.25, 0.5, 1.0, 1.5])
def test_five_seconds_of_short_steps_hold_the_share_within_a_percent(amount: float) -> None:
    machine = Machine(oversleep_s=0.0001)
    duty = machine.duty(amount)
    while machine.now_s < 105.0:
        machine.compute(0.012, cores=num_threads(amount))
        duty.hold_back()
    assert (machine.used_s - 7.0) / (machine.now_s - 100.0) == pytest.approx(amount, rel=0.01)


def test_a_whole_core_on_one_core_never_sleeps() -> None:
    machine = Machine()
    duty = machine.duty(1.0)
    for _ in range(100):
        machine.compute(0.01)
        assert duty.hold_back() == 0.0


def test_idle_time_is_not_saved_up_beyond_the_burst() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    machine.idle(60.0)
    assert duty.hold_back() == 0.0
    machine.compute(1.0)
    # The step earned half of its second; the burst adds its part; the rest is slept off at half a core.
    assert duty.hold_back() == pytest.approx((1.0 - 0.5 - BURST_S * 0.5) / 0.5)


def test_a_debt_is_carried_exactly_when_the_sleep_is_cut_short() -> None:
    machine = Machine()
    duty = machine.duty(0.25)
    machine.wakes_after_s = 0.05
    machine.compute(0.1)
    assert duty.hold_back() == pytest.approx(0.05)
    machine.wakes_after_s = None
    assert duty.hold_back() == pytest.approx(0.25)
    assert machine.now_s - 100.0 == pytest.approx(0.1 / 0.25)


def test_a_debt_made_at_the_old_rate_is_paid_at_the_new_one() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    machine.compute(0.1)
    duty.set_amount(1.0)
    assert duty.debt_s == pytest.approx(0.05)
    assert duty.hold_back() == pytest.approx(0.05)


def test_background_threads_are_charged_while_the_process_sleeps() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    machine.compute(0.1)
    duty.hold_back()
    machine.used_s += 0.02
    assert duty.hold_back() == pytest.approx(0.04)


def test_nothing_is_held_back_before_the_first_amount_or_after_the_stop() -> None:
    machine = Machine()
    duty = DutyCycle(lambda: machine.now_s, lambda: machine.used_s, machine.wait)
    machine.compute(1.0)
    assert duty.hold_back() == 0.0
    duty.set_amount(0.5)
    machine.compute(1.0)
    duty.stop()
    assert duty.hold_back() == 0.0
    assert duty.charged_s == pytest.approx(1.0)
    assert duty.debt_s == 0.0


@pytest.mark.parametrize(("amount", "count"), [(0.25, 1), (1.0, 1), (1.0004, 1), (1.5, 2), (2.0, 2), (2.01, 3)])
def test_threads_are_as_many_as_can_use_the_amount(amount: float, count: int) -> None:
    assert num_threads(amount) == count
