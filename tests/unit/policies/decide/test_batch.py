from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.decide.batch import neighbours
from orchestrator.policies.plan import Settings
from tests.unit.policies.builders import limits, settings


def splits(options: tuple[Settings, ...]) -> list[tuple[int, int]]:
    return [(option.micro_batch, option.grad_accum) for option in options]


def test_half_and_double_are_reached_by_the_micro_batch_where_it_fits() -> None:
    options = neighbours(settings(micro_batch=8), limits(batches=(1, 64)))
    assert splits(options) == [(4, 1), (16, 1)]


def test_a_full_micro_batch_grows_by_accumulation() -> None:
    options = neighbours(settings(micro_batch=8), limits(batches=(8, 64), max_micro_batch=8))
    assert splits(options) == [(8, 2)]


def test_accumulation_is_traded_for_a_larger_micro_batch_at_the_same_global_batch() -> None:
    options = neighbours(settings(micro_batch=8, grad_accum=4), limits(batches=(32, 32), max_micro_batch=32))
    assert splits(options) == [(16, 2)]


def test_a_fixed_batch_that_is_split_best_has_no_neighbours() -> None:
    assert neighbours(settings(micro_batch=8), limits(batches=(8, 8))) == ()


def test_the_limit_itself_is_reached_where_doubling_would_overshoot() -> None:
    options = neighbours(settings(micro_batch=8), limits(batches=(6, 12)))
    assert splits(options) == [(6, 1), (12, 1)]


def test_a_cap_on_the_micro_batch_is_respected() -> None:
    options = neighbours(settings(micro_batch=8), limits(batches=(1, 64)), micro_batch_cap=8)
    assert (16, 1) not in splits(options)
    assert (8, 2) in splits(options)


@given(
    st.integers(1, 300), st.integers(1, 9), st.integers(1, 400), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)
)
def test_neighbours_are_near_and_inside_the_limits(
    micro_batch: int, grad_accum: int, max_micro: int, num_workers: int, below: int, above: int
) -> None:
    now = Settings(
        share=0.5, micro_batch=micro_batch, grad_accum=grad_accum, tier=settings().tier, num_workers=num_workers
    )
    batches = (max(1, now.global_batch // (below + 1)), now.global_batch * (above + 1))
    options = neighbours(now, limits(batches=batches, max_micro_batch=max_micro))
    assert list(options) == sorted(options, key=lambda option: option.global_batch)
    for option in options:
        assert option != now
        assert batches[0] <= option.global_batch <= batches[1]
        assert option.micro_batch <= max(max_micro, micro_batch)
        for old, new in ((now.global_batch, option.global_batch), (micro_batch, option.micro_batch)):
            assert old <= 2 * new
            assert new <= 2 * old
