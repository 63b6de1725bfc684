"""Which step mode is chosen by which times: eager steps must look faster several times over."""

import itertools

import pytest

from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train.step_mode.choice import (
    MAX_ROUNDS,
    NUM_EAGER,
    NUM_GRAPH,
    NUM_RACES,
    ModeChoice,
    StepMode,
)

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


def raced(compiled_s: list[float], graph_s: float = 4.0) -> ModeChoice:
    """A race in which compiled steps take so long in each turn."""
    choice = ModeChoice(StepMode.AUTO, None)
    take(choice, NUM_EAGER + NUM_GRAPH, eager_s=9.0, graph_s=graph_s)
    assert choice.may_compile(KEY) == graph_s
    choice.race(KEY)
    for turn in range(NUM_RACES):
        for mode in (StepMode.COMPILED, StepMode.GRAPH):
            assert not choice.is_settled(KEY)
            for _ in range(NUM_GRAPH):
                assert choice.mode(KEY) is mode
                choice.note(KEY, mode, compiled_s[turn] if mode is StepMode.COMPILED else graph_s)
    return choice


def test_compiled_steps_stay_where_they_are_faster_more_often() -> None:
    choice = raced([3.0, 5.0, 3.0])
    assert choice.is_settled(KEY)
    assert choice.mode(KEY) is StepMode.COMPILED
    assert choice.take_loser(KEY) == (StepMode.GRAPH, 0.25)
    assert choice.take_loser(KEY) is None
    found = choice.measured(KEY, SETTINGS)
    assert found is not None
    assert (found.is_replayed, found.eager_s, found.replayed_s) == (True, 9.0, 3.0)
    assert choice.words(KEY) == "compiled: eager 9000.00 ms, graph 4000.00 ms per step, compiled 0.75 of graph"
    assert choice.may_compile(KEY) is None, "it is done"


def test_compiled_steps_that_are_slower_are_left() -> None:
    choice = raced([5.0, 3.0, 5.0])
    assert choice.mode(KEY) is StepMode.GRAPH
    assert choice.take_loser(KEY) == (StepMode.COMPILED, -0.25)
    assert choice.may_compile(KEY) is None


def test_steps_that_come_back_late_belong_to_no_turn() -> None:
    choice = ModeChoice(StepMode.AUTO, None)
    take(choice, NUM_EAGER + NUM_GRAPH, eager_s=9.0, graph_s=4.0)
    choice.race(KEY)
    for _ in range(NUM_RACES):
        for mode, late in ((StepMode.COMPILED, StepMode.GRAPH), (StepMode.GRAPH, StepMode.COMPILED)):
            choice.note(KEY, late, 1000.0)
            for _ in range(NUM_GRAPH):
                choice.note(KEY, mode, 3.0 if mode is StepMode.COMPILED else 4.0)
    assert choice.take_loser(KEY) == (StepMode.GRAPH, 0.25)


@pytest.mark.parametrize("num_raced", [0, 1, 2 * NUM_RACES * NUM_GRAPH])
def test_compiled_steps_that_cannot_be_recorded_any_more_are_left(num_raced: int) -> None:
    choice = ModeChoice(StepMode.AUTO, None)
    take(choice, NUM_EAGER + NUM_GRAPH, eager_s=9.0, graph_s=4.0)
    choice.race(KEY)
    for _ in range(num_raced):
        mode = choice.mode(KEY)
        choice.note(KEY, mode, 3.0 if mode is StepMode.COMPILED else 4.0)
    choice.not_compiled(KEY, "(RuntimeError: another stream)")
    assert choice.mode(KEY) is StepMode.GRAPH
    assert choice.is_settled(KEY)
    assert choice.take_loser(KEY) is None
    assert choice.may_compile(KEY) is None


@pytest.mark.parametrize("wish", [StepMode.EAGER, StepMode.GRAPH])
def test_nothing_is_compiled_where_another_mode_is_asked_for(wish: StepMode) -> None:
    choice = ModeChoice(wish, None)
    take(choice, 30, eager_s=9.0, graph_s=4.0)
    assert choice.mode(KEY) is wish
    assert choice.may_compile(KEY) is None


def test_compiled_steps_that_were_asked_for_and_cannot_be_had_are_replayed_as_they_are() -> None:
    choice = ModeChoice(StepMode.COMPILED, None)
    assert choice.mode(KEY) is StepMode.COMPILED
    choice.not_compiled(KEY, "(Unsupported: a hook)")
    assert choice.mode(KEY) is StepMode.GRAPH
    assert choice.words(KEY) == "graph; not compiled: (Unsupported: a hook)"
