"""The number of trials that share a GPU is found by trying, kept, and remembered."""

from __future__ import annotations

import pytest

from orchestrator.control.knee import FIRST_LIMIT, Knee, affordable


def let_run(knee: Knee, sums: dict[int, float], running: int, began_s: float, dials: object = "16 bf16") -> list[str]:
    """Run so many trials for ten seconds, whose sum follows `sums` (the last value beyond its end); what was said."""
    total = sums.get(running, sums[max(sums)])
    observe = (knee.observe(began_s + second, "s", [total / running] * running, running, dials) for second in range(10))
    return [words for words in observe if words is not None]


def search(sums: dict[int, float], most: int = 16) -> tuple[Knee, list[str]]:
    """Run as many trials as the knee allows, until that stays the same."""
    knee, said, now_s = Knee(), [], 0.0
    for _ in range(40):
        said += let_run(knee, sums, min(knee.limit("s"), most), now_s)
        now_s += 10.0
    return knee, said


@pytest.mark.parametrize(
    ("sums", "found", "num_tries"),
    [
        ({4: 300, 6: 280, 8: 290}, 4, 4),
        ({4: 300, 5: 340, 6: 390, 7: 392, 8: 305}, 6, 4),
        ({4: 300, 6: 320, 7: 360, 8: 400, 9: 400, 10: 401, 12: 402, 16: 405}, 8, 6),
        ({4: 100, 8: 200, 16: 300}, 32, 4),
    ],
)
def test_twice_as_many_while_the_sum_rises_then_the_best_in_between(
    sums: dict[int, float], found: int, num_tries: int
) -> None:
    knee, said = search(sums)
    assert knee.limit("s") == found
    assert len(said) <= num_tries, "it was looked for once"
    if found in sums:
        assert knee.found == {"s": found}
        assert f"the knee is {found} trials at a time" in said[-1]


def test_fewer_are_found_where_fewer_happen_to_run_and_are_as_good() -> None:
    sums = {1: 100.0, 2: 198.0, 3: 199.0, 4: 200.0}
    knee, _ = search(sums)
    assert knee.found == {"s": 4}
    let_run(knee, sums, 4, 1000.0)
    assert "the knee is 2 trials at a time" in let_run(knee, sums, 2, 1010.0)[0]
    let_run(knee, sums, 1, 1020.0)
    assert knee.found == {"s": 2}, "one alone is not as good"


@pytest.mark.parametrize("dials", ["64 bf16", None])
def test_other_dials_say_nothing_of_fewer(dials: object) -> None:
    knee, _ = search({4: 200.0})
    let_run(knee, {2: 900.0}, 2, 1000.0, dials)
    assert knee.found == {"s": 4}


def test_as_many_as_run_are_not_said_again_and_again() -> None:
    knee = Knee()
    sums = {4: 300.0, 8: 301.0}
    let_run(knee, sums, 4, 0.0)
    assert len(let_run(knee, sums, 8, 10.0)) == 1, "six shall be tried once two have ended"
    assert knee.limit("s") == 6


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
        running = min(2 * knee.limit("s"), int(now_s) // 10 + 1)  # they come one by one
        total = 45.0 * min(running, 12)
        knee.observe(now_s, "s", [total / running] * running, running // 2 if running % 2 == 0 else None)
    assert knee.found == {"s": 6}


@pytest.mark.parametrize(
    ("free", "peak", "running", "most"),
    [(100, 30, 2, 5), (20, 30, 2, 2), (-5, 30, 3, 3), (100, None, 0, 1), (9, 0, 2, 2)],
)
def test_memory_allows_so_many(free: int, peak: int | None, running: int, most: int) -> None:
    assert affordable(free, peak, running) == most
