"""The number of trials that share a GPU is found by trying, kept, and remembered."""

from __future__ import annotations

import pytest

from orchestrator.control.knee import FIRST_LIMIT, Knee, affordable


def search(sums: dict[int, float], most: int = 12) -> tuple[Knee, list[str]]:
    """Run trials as the knee allows, whose sum follows `sums` (the last value beyond its end)."""
    knee, said, now_s = Knee(), [], 0.0
    for _ in range(400):
        now_s += 1.0
        running = min(knee.limit("s"), most)
        total = sums.get(running, sums[max(sums)])
        words = knee.observe(now_s, "s", [total / running] * running, running)
        if words is not None:
            said.append(words)
    return knee, said


@pytest.mark.parametrize(
    ("sums", "found"),
    [
        ({1: 100, 2: 190, 3: 260, 4: 300, 5: 290}, 4),
        ({1: 100, 2: 110, 3: 111}, 2),
        ({1: 100, 2: 200, 3: 180}, 2),
        ({1: 100, 2: 200, 3: 300, 4: 305}, 3),
    ],
)
def test_one_more_while_the_sum_rises_then_back_to_the_best(sums: dict[int, float], found: int) -> None:
    knee, said = search(sums)
    assert knee.limit("s") == found
    assert knee.found == {"s": found}
    assert f"the knee is {found} trials at a time" in said[-1]
    assert len(said) <= found, "it was looked for once"


def test_what_was_found_before_is_where_it_begins() -> None:
    assert Knee({"s": 5}).limit("s") == 5
    assert Knee({"s": 0}).limit("s") == FIRST_LIMIT
    assert Knee().limit("s") == FIRST_LIMIT


def test_nothing_follows_from_rates_that_are_not_there_or_still_move() -> None:
    knee = Knee()
    for second in range(20):
        assert knee.observe(float(second), "s", [100.0, None], 2) is None
    for second in range(20, 40):
        num_trials = 2 + second % 2
        assert knee.observe(float(second), "s", [100.0] * num_trials, num_trials) is None


def test_on_two_devices_the_number_on_each_is_looked_for() -> None:
    knee, now_s = Knee(), 0.0
    while not knee.found and now_s < 400:
        now_s += 1.0
        running = min(2 * knee.limit("s"), int(now_s) // 20 + 1)  # they come one by one
        total = {1: 100.0, 2: 190.0, 3: 290.0, 4: 380.0, 5: 440.0, 6: 500.0}.get(running, 505.0)
        knee.observe(now_s, "s", [total / running] * running, running // 2 if running % 2 == 0 else None)
    assert knee.found == {"s": 3}


@pytest.mark.parametrize(
    ("free", "peak", "running", "most"),
    [(100, 30, 2, 5), (20, 30, 2, 2), (-5, 30, 3, 3), (100, None, 0, 1), (9, 0, 2, 2)],
)
def test_memory_allows_so_many(free: int, peak: int | None, running: int, most: int) -> None:
    assert affordable(free, peak, running) == most
