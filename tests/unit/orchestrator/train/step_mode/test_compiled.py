"""When steps are compiled, who does it first, and that a compiled trial trains as the others do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.jobs import JOB_INFO, build_job
from orchestrator.jobs.job import Job
from orchestrator.policies.tier import Tier
from orchestrator.train.precision.tiers import lowered
from orchestrator.train.step_mode import compiled
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.compiled import FIRST_S, OWN_S, REPORT_PART, STEADY_PART, Ahead, Compilation
from orchestrator.train.step_result import StepResult
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK
from tests.unit.orchestrator.train.step_mode.test_replay import REPLAYED, run, stepper

DIALS = (8, Tier.BF16)
LONG_S = 1e6
WHOLE = Ahead(1, 1)
"""A trial of one sample, so that the seconds of a sample are those of all there is to come."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node and a process that have compiled nothing; kernels are torch's own, without a C++ compiler."""
    monkeypatch.setenv(compiled.CACHE, str(tmp_path / "kernels"))
    another_process(monkeypatch)
    compile_whole = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, fullgraph, options: compile_whole(  # noqa: ARG005
            function, fullgraph=fullgraph, backend="aot_eager"
        ),
    )
    compiled._function.cache_clear()
    yield tmp_path / "kernels"
    compiled._function.cache_clear()
    torch.compiler.reset()


def job_and_model() -> tuple[Job, nn.Module]:
    job = build_job("mlp", {})
    return job, job.build_model()


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, this is one of the same node that has compiled nothing itself."""
    for name in ("_own_s", "_num_processes", "_savings"):
        monkeypatch.setattr(compiled, name, {})
    monkeypatch.setattr(compiled, "_refused", set())


def steady(job: Job, model: nn.Module, ahead: Ahead = WHOLE) -> tuple[Compilation, Clock]:
    """A trial whose dials have stayed long enough."""
    clock = Clock()
    one = Compilation(job, model, ahead, clock)
    assert not one.is_due(DIALS, LONG_S, 0), "the dials may turn at once"
    clock.now_s = FIRST_S
    return one, clock


def test_only_what_wins_its_time_back_is_compiled() -> None:
    one, clock = steady(*job_and_model())
    enough_s = FIRST_S / compiled.EXPECTED_SAVING
    assert not one.is_due(DIALS, 0.9 * enough_s, 0)
    clock.now_s += 1
    assert one.is_due(DIALS, 1.1 * enough_s, 0)


def test_dials_that_have_just_turned_are_not_compiled() -> None:
    one, clock = steady(*job_and_model())
    assert not one.is_due((16, Tier.BF16), LONG_S, 0)
    clock.now_s += 0.9 * STEADY_PART * FIRST_S
    assert not one.is_due((16, Tier.BF16), LONG_S, 0)
    clock.now_s += 0.2 * STEADY_PART * FIRST_S
    assert one.is_due((16, Tier.BF16), LONG_S, 0)


@pytest.mark.parametrize("part", [0.9, 1.1])
def test_a_first_report_is_not_put_off_for_long(part: float) -> None:
    """There the search compares the trial with those that began with it; behind it nothing is put off."""
    ahead = Ahead(1000, 100)
    sample_s = part * FIRST_S / REPORT_PART / ahead.samples_per_report
    job, model = job_and_model()
    one, clock = steady(job, model, ahead)
    assert one.is_due(DIALS, sample_s, 999) is (part > 1)
    clock.now_s += 1
    assert one.is_due(DIALS, sample_s, 1000)
    del one  # as if its process had ended: it is its turn no more
    only, _ = steady(job, model, Ahead(1000, 1, num_trials=100))
    assert only.is_due(DIALS, sample_s, 0), "nothing is compared where the first report is the last"


def test_the_next_trial_of_a_slot_is_expected_to_compile_nothing_and_then_what_was_measured() -> None:
    job, model = job_and_model()
    for cost_s in (FIRST_S, OWN_S, 3.0):
        one, clock = steady(job, model)
        assert not one.is_due(DIALS, 0.9 * cost_s / compiled.EXPECTED_SAVING, 0)
        clock.now_s += 1
        assert one.is_due(DIALS, 1.1 * cost_s / compiled.EXPECTED_SAVING, 0)
        with one.measured(DIALS):
            clock.now_s += 3.0


def test_one_process_of_a_node_compiles_first_and_the_others_follow_at_less_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, model = job_and_model()
    first, first_clock = steady(job, model)
    other, other_clock = steady(job, model)
    assert first.is_due(DIALS, LONG_S, 0)
    assert not other.is_due(DIALS, LONG_S, 0), "the first one is at it"
    with first.measured(DIALS):
        first_clock.now_s += 20.0
    another_process(monkeypatch)
    other_clock.now_s += 1.0
    again_s = compiled.AGAIN_PART * 20.0
    assert not other.is_due(DIALS, 0.9 * again_s / compiled.EXPECTED_SAVING, 0)
    other_clock.now_s += 1.0
    assert other.is_due(DIALS, 1.1 * again_s / compiled.EXPECTED_SAVING, 0)
    with other.measured(DIALS):
        other_clock.now_s += 2.0
    another_process(monkeypatch)
    third, clock = steady(job, model)
    assert third.is_due(DIALS, 2.1 / compiled.EXPECTED_SAVING, 0), "what the second one took is what counts"
    assert clock.now_s == FIRST_S


def test_whoever_gets_the_next_turn_finds_the_note_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending compilers takes a second, in which others look."""
    job, model = job_and_model()
    first, first_clock = steady(job, model)
    other, other_clock = steady(job, model)
    assert first.is_due(DIALS, LONG_S, 0)
    seen = []

    def look() -> None:
        monkeypatch.setattr(compiled, "_own_s", {})  # as another process
        other_clock.now_s += 1.0
        again_s = compiled.AGAIN_PART * 20.0
        seen.append(other.is_due(DIALS, 0.9 * again_s / compiled.EXPECTED_SAVING, 0))

    monkeypatch.setattr(compiled, "_stop_compilers", look)
    with first.measured(DIALS):
        first_clock.now_s += 20.0
    assert seen == [False], "it reads for what that costs"
    assert other._known(other._name(DIALS)) == {"first_s": 20.0}


def test_a_turn_that_comes_just_behind_the_first_compilation_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    job, model = job_and_model()
    one, clock = steady(job, model)
    told = {"first_s": 20.0}
    answers = iter([{}, {}, told])  # the note is written between the look at it and the lock
    monkeypatch.setattr(one, "_known", lambda _name: dict(next(answers, told)))
    assert not one.is_due(DIALS, LONG_S, 0)
    assert one._turn is None
    clock.now_s += 1.0
    assert one.is_due(DIALS, LONG_S, 0)


def test_a_note_of_a_first_compilation_stays() -> None:
    one, _ = steady(*job_and_model())
    one._tell(one._name(DIALS), is_first=True, seconds=16.0)
    one._tell(one._name(DIALS), is_first=True, seconds=3.0)
    assert one._known(one._name(DIALS)) == {"first_s": 16.0, "again_s": 3.0}


def test_a_turn_is_that_of_one_kind_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    job, model = job_and_model()
    (one, clock), (other, other_clock) = steady(job, model), steady(job, model)
    assert one.is_due(DIALS, LONG_S, 0)
    turned = DIALS[0], Tier.FP32
    for each in (one, other):
        assert not each.is_due(turned, LONG_S, 0)
    for each_clock in (clock, other_clock):
        each_clock.now_s += FIRST_S
    assert other.is_due(turned, LONG_S, 0)
    assert not one.is_due(turned, LONG_S, 0), "it had the turn of the tier before"
    other.end_turn()
    clock.now_s += 1.0
    assert one.is_due(turned, LONG_S, 0)


def test_a_second_trial_of_a_slot_compiles_nothing() -> None:
    for number in range(2):
        job, model = job_and_model()
        job.prepare()
        one = Compilation(job, model, WHOLE)
        with one.measured(DIALS):
            one.loss(model, job.batch(range(8), torch.device("cpu"))).loss_sum.backward()  # type: ignore[no-untyped-call]
        if number == 0:
            num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert num_graphs > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    assert compiled._function.cache_info().misses == 1


def test_a_process_that_dies_while_it_compiles_keeps_nobody_from_it() -> None:
    job, model = job_and_model()
    first, _ = steady(job, model)
    assert first.is_due(DIALS, LONG_S, 0)
    del first  # as the kernel closes what a dead process had open
    other, _ = steady(job, model)
    assert other.is_due(DIALS, LONG_S, 0)


def test_what_could_not_be_compiled_is_not_tried_again_by_the_next_trial() -> None:
    job, model = job_and_model()
    first, _ = steady(job, model)
    with pytest.raises(RuntimeError, match="no"), first.measured(DIALS):
        raise RuntimeError("no")
    assert not steady(job, model)[0].is_due(DIALS, LONG_S, 0)


def test_what_saved_nothing_is_not_compiled_again_and_what_saved_much_sooner() -> None:
    job, model = job_and_model()
    first, _ = steady(job, model)
    first.saves(DIALS, -0.1)
    assert not steady(job, model)[0].is_due(DIALS, LONG_S, 0)
    first.saves(DIALS, 0.5)
    assert steady(job, model)[0].is_due(DIALS, 1.1 * FIRST_S / 0.5, 0)


ANY = replace(WHOLE, turns_batch=True)
LARGER = (32, Tier.BF16)


def test_what_is_compiled_for_any_batch_costs_nothing_more_with_the_next_one() -> None:
    job, model = job_and_model()
    for ahead, cost_s in ((WHOLE, FIRST_S), (ANY, OWN_S)):
        one, clock = steady(job, model, ahead)
        with one.measured(DIALS):
            clock.now_s += 20.0
        assert not one.is_due(LARGER, 0.9 * cost_s / compiled.EXPECTED_SAVING, 0)
        clock.now_s += FIRST_S
        assert not one.is_due(LARGER, 0.9 * cost_s / compiled.EXPECTED_SAVING, 0)
        clock.now_s += 1.0
        assert one.is_due(LARGER, 1.1 * cost_s / compiled.EXPECTED_SAVING, 0)
        one.end_turn()


def test_what_saves_nothing_with_one_batch_may_do_so_with_another() -> None:
    job, model = job_and_model()
    first, _ = steady(job, model, ANY)
    first.saves(LARGER, -0.1)
    other, clock = steady(job, model, ANY)
    assert other.is_due(DIALS, LONG_S, 0)
    assert not other.is_due(LARGER, LONG_S, 0)
    clock.now_s += FIRST_S
    assert not other.is_due(LARGER, LONG_S, 0)


def test_what_cannot_be_compiled_for_any_batch_is_not_tried_with_another() -> None:
    job, model = job_and_model()
    first, _ = steady(job, model, ANY)
    with pytest.raises(RuntimeError, match="no"), first.measured(DIALS):
        raise RuntimeError("no")
    other, clock = steady(job, model, ANY)
    assert not other.is_due(LARGER, LONG_S, 0)
    clock.now_s += FIRST_S
    assert not other.is_due(LARGER, LONG_S, 0)


@pytest.mark.parametrize("name", [name for name in JOB_INFO if name != "speech"])
def test_one_compilation_is_enough_for_a_trial_whose_batch_turns(name: str) -> None:
    """Two of a model in which a fixed batch is computed with; `speech` cannot be compiled as a whole."""
    job = build_job(name, {})
    job.prepare()
    model = job.build_model()
    one, num_graphs = Compilation(job, model, ANY), []
    torch._dynamo.utils.counters.clear()
    for size in (8, 32, 12, 64):
        batch = job.batch(range(size), torch.device("cpu"))
        with lowered(Tier.FP32, torch.device("cpu")):
            found, wanted = one.loss(model, batch), job.loss(model, batch)
        assert found.num_elements == wanted.num_elements
        torch.testing.assert_close(found.loss_sum, wanted.loss_sum)
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_graphs[1:] == [num_graphs[1]] * 3
    assert num_graphs[0] == num_graphs[1] or name in {"tissue", "genome"}


@pytest.mark.parametrize("ahead", [WHOLE, ANY])
def test_kernels_for_any_batch_do_without_what_binds_them_to_sizes(
    ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compile_nothing(function: object, fullgraph: bool, options: dict[str, object]) -> object:
        assert fullgraph
        seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    job, model = job_and_model()
    Compilation(job, model, ahead).loss(model, job.batch(range(4), torch.device("cpu")))
    wanted: dict[str, object] = {"triton.mix_order_reduction": False} if ahead.turns_batch else {}
    assert seen == [{"compile_threads": 1, **wanted}]
    assert wanted.keys() <= set(torch._inductor.list_options())


@pytest.mark.parametrize("given", [None, "theirs"])
def test_kernels_lie_where_the_user_says_or_beside_the_runs(given: str | None, tmp_path: Path) -> None:
    """Importing a slot's modules sets torch's variable by itself, which counts as nothing said."""
    script = (
        "import os, sys, orchestrator.train.slot as slot; from pathlib import Path; before = os.environ[sys.argv[1]]"
    )
    script += "; slot.set_up(Path(sys.argv[2])); print(before, os.environ[sys.argv[1]])"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop(compiled.CACHE)
    if given is not None:
        environment[compiled.CACHE] = str(tmp_path / given)
    command = [sys.executable, "-c", script, compiled.CACHE, str(tmp_path / "runs" / ".compiled")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = map(Path, done.stdout.split())
    if given is None:
        assert before.name.startswith("torchinductor_")
        assert after == tmp_path / "runs" / ".compiled"
    else:
        assert before == after == tmp_path / given


@pytest.mark.parametrize("text", ["", "[]", "{", '{"first_s": "long"}', '{"again_s": null}'])
def test_a_note_that_cannot_be_read_counts_as_none(place: Path, text: str) -> None:
    job, model = job_and_model()
    one, clock = steady(job, model)
    with one.measured(DIALS):
        clock.now_s += 20.0
    notes = list(place.rglob("*.json"))
    assert len(notes) == 1
    notes[0].write_text(text)
    compiled._own_s.clear()
    other, _ = steady(job, model)
    assert not other.is_due(DIALS, 0.9 * FIRST_S / compiled.EXPECTED_SAVING, 0)


def test_a_directory_that_cannot_be_written_is_no_reason_not_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiled.CACHE, str(tmp_path / "file" / "kernels"))
    one, _ = steady(*job_and_model())
    assert one.is_due(DIALS, LONG_S, 0)
    with one.measured(DIALS):
        pass


def test_the_process_is_left_as_it_was() -> None:
    one, _ = steady(*job_and_model())
    environment, path, limit = dict(os.environ), list(sys.path), sys.getrecursionlimit()
    with one.measured(DIALS):
        os.environ["LEFT_BEHIND"] = "1"
        sys.path.append("/left/behind")
        sys.setrecursionlimit(limit + 1)
    assert (dict(os.environ), sys.path, sys.getrecursionlimit()) == (environment, path, limit)


def test_models_that_differ_in_a_hook_only_share_no_kernels() -> None:
    job, model = job_and_model()
    before = compiled._kind_of(job, model)
    model.register_forward_pre_hook(lambda _module, _inputs: None)
    assert compiled._kind_of(job, model) != before


@pytest.mark.parametrize("name", sorted(JOB_INFO))
def test_the_loss_of_every_job_but_one_can_be_compiled_as_a_whole(name: str) -> None:
    job = build_job(name, {})
    job.prepare()
    torch.manual_seed(0)
    model = job.build_model()
    batch = job.batch(list(range(4)), torch.device("cpu"))
    state = torch.get_rng_state()
    wanted = job.loss(model, batch)
    torch.set_rng_state(state)
    if name == "speech":  # CTC makes alignments whose number depends on the words
        with pytest.raises(Exception, match="ctc_loss"):
            Compilation(job, model, WHOLE).loss(model, batch)
        return
    found = Compilation(job, model, WHOLE).loss(model, batch)
    assert found.num_elements == wanted.num_elements
    torch.testing.assert_close(found.loss_sum, wanted.loss_sum, rtol=1e-4, atol=1e-4)


def taking(one: Stepper, seconds: dict[StepMode, float]) -> None:
    """Let steps of each mode take so long, as far as the choice is told."""
    note = one._recorded._modes.note

    def told(key: object, mode: StepMode, seconds_really: float) -> None:
        note(key, mode, seconds[mode])

    one._recorded._modes.note = told  # type: ignore[method-assign, assignment]


def compiling_at_once(one: Stepper) -> Stepper:
    """Without waiting for dials to stay."""
    one._recorded._compilation._ahead = Ahead(1, 10**12)
    one._recorded._compilation._since_s = -LONG_S
    one._recorded._compilation._dials = (one.settings.micro_batch, one.settings.tier)
    return one


def test_compiled_steps_train_as_eager_ones_do(tmp_path: Path) -> None:
    wanted = run(stepper(ONE_RANK, tmp_path), 40)
    one = stepper(replace(REPLAYED, step_mode=StepMode.COMPILED), tmp_path)
    found = run(one, 40)
    assert {result.mode for result in found[1:]} == {StepMode.COMPILED}
    np.testing.assert_allclose([r.loss for r in found], [r.loss for r in wanted], rtol=1e-5)
    assert one.mode_words == "compiled: as asked for"


def test_a_trial_compiles_by_itself_and_keeps_the_faster_mode(tmp_path: Path) -> None:
    wanted = run(stepper(ONE_RANK, tmp_path), 120)
    one = compiling_at_once(stepper(replace(REPLAYED, step_mode=StepMode.AUTO), tmp_path))
    taking(one, {StepMode.EAGER: 3.0, StepMode.GRAPH: 2.0, StepMode.COMPILED: 1.0})
    found = run(one, 120)
    assert [r.step for r in found] == list(range(120))
    assert {r.mode for r in found[:3]} == {StepMode.EAGER}
    assert {r.mode for r in found[-20:]} == {StepMode.COMPILED}
    np.testing.assert_allclose([r.loss for r in found], [r.loss for r in wanted], rtol=1e-5)
    assert "compiled 0.50 of graph" in one.mode_words
    assert one._recorded._replay is not None
    assert one._recorded._replay.captured.num_recordings == 1, "that of the slower mode is dropped"
    assert list(compiled._savings.values()) == [0.5]


def test_a_batch_turns_in_compiled_steps_without_compiling_anew(tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    modes = StepMode.GRAPH, StepMode.COMPILED
    trials = [stepper(replace(REPLAYED, step_mode=mode), tmp_path) for mode in modes]
    found: list[list[StepResult]] = [[], []]
    for micro_batch in (8, 16, 8, 32):
        for trial, results in zip(trials, found, strict=True):
            trial.turn(replace(trial.settings, micro_batch=micro_batch))
            results.extend(run(trial, 20))
    for mode, results in zip(modes, found, strict=True):
        assert {result.mode for result in results} == {StepMode.EAGER, mode}
    wanted, compiled_ones = found
    assert [r.position for r in compiled_ones] == [r.position for r in wanted]
    assert [r.learning_rate for r in compiled_ones] == pytest.approx([r.learning_rate for r in wanted], rel=1e-4)
    np.testing.assert_allclose([r.loss for r in compiled_ones], [r.loss for r in wanted], rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_model_that_cannot_be_compiled_is_replayed_as_it_is(tmp_path: Path) -> None:
    one = compiling_at_once(stepper(replace(REPLAYED, step_mode=StepMode.AUTO), tmp_path))
    taking(one, dict.fromkeys(StepMode, 1.0))
    one.model.register_forward_pre_hook(partial(torch.compiler.disable, recursive=False)(_nothing))
    found = run(one, 60)
    assert [r.step for r in found] == list(range(60))
    assert {r.mode for r in found[-20:]} == {StepMode.GRAPH}
    assert "; not compiled: (Unsupported" in one.mode_words
    assert "\n" not in one.mode_words


def _nothing(_module: object, _inputs: object) -> None:
    """What torch must not look into."""
