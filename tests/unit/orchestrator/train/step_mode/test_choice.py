"""Which step mode is chosen by which times: eager steps must look faster several times over."""

import itertools

import pytest

from orchestrator.train.step_mode.choice import MAX_ROUNDS, NUM_EAGER, NUM_GRAPH, ModeChoice, StepMode
from policies.plan import Settings
from policies.tier import Tier

KEY = ("micro-batch", 8)
SETTINGS = Settings(share=1.0, num_workers=1, micro_batch=8, grad_accum=1, tier=Tier.FP32)


def take(choice: ModeChoice, num_steps: int, eager_s: float, graph_s: float) -> list[StepMode]:
    """Do steps in the mode that is asked for, which take so long."""
    modes = []
    for _ in range(num_steps):
        modes.append(mode := choice.mode(KEY))
        choice.note(KEY, mode, eager_s if mode is StepMode.EAGER else graph_s)
    return modes


def test_a_replayed_step_that_is_not_slower_is_chosen_at_once() -> None:
    choice = ModeChoice(StepMode.AUTO, None)
    modes = take(choice, 30, eager_s=5.0, graph_s=5.0)
    assert modes == [StepMode.EAGER] * NUM_EAGER + [StepMode.GRAPH] * (30 - NUM_EAGER)
    found = choice.measured(KEY, SETTINGS)
    assert found is not None
    assert (found.is_replayed, found.eager_s, found.replayed_s) == (True, 5.0, 5.0)


@pytest.mark.parametrize("num_noisy", range(1, MAX_ROUNDS))
def test_busy_neighbours_while_replays_are_timed_do_not_make_a_trial_eager(num_noisy: int) -> None:
    choice = ModeChoice(StepMode.AUTO, None)
    a_round = NUM_EAGER + NUM_GRAPH
    take(choice, num_noisy * a_round, eager_s=10.0, graph_s=14.0)
    assert not choice.is_settled(KEY)
    assert choice.measured(KEY, SETTINGS) is None
    assert take(choice, a_round + 20, eager_s=10.0, graph_s=4.0)[-20:] == [StepMode.GRAPH] * 20


def test_eager_steps_that_are_faster_every_time_are_chosen() -> None:
    choice = ModeChoice(StepMode.AUTO, None)
    modes = take(choice, 60, eager_s=4.0, graph_s=5.0)
    runs = [(mode, len(list(group))) for mode, group in itertools.groupby(modes)]
    assert runs[: 2 * MAX_ROUNDS] == [(StepMode.EAGER, NUM_EAGER), (StepMode.GRAPH, NUM_GRAPH)] * MAX_ROUNDS
    assert runs[2 * MAX_ROUNDS :] == [(StepMode.EAGER, 60 - MAX_ROUNDS * (NUM_EAGER + NUM_GRAPH))]
    found = choice.measured(KEY, SETTINGS)
    assert found is not None
    assert (found.is_replayed, found.eager_s, found.replayed_s) == (False, 4.0, 5.0)


def test_replays_that_come_back_after_the_choice_change_nothing() -> None:
    choice = ModeChoice(StepMode.AUTO, None)
    take(choice, MAX_ROUNDS * (NUM_EAGER + NUM_GRAPH), eager_s=4.0, graph_s=5.0)
    for _ in range(10):
        choice.note(KEY, StepMode.GRAPH, 1.0)
    assert choice.mode(KEY) is StepMode.EAGER
