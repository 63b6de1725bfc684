"""Steps that are replayed: the same training as eager steps, though results come late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from orchestrator.control.orders import Status
from orchestrator.jobs import build_job
from orchestrator.jobs.job import Job
from orchestrator.jobs.optim import adamw
from orchestrator.policies.snapshot import StepModeView
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import FLAG_GRAPH, FLAG_SKIPPED, FLAG_UNSETTLED
from orchestrator.train import fsdp
from orchestrator.train.batch.noise import weights_of
from orchestrator.train.groups import Ranks
from orchestrator.train.step_mode.captured import MAX_FLYING, MAX_RECORDINGS
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_result import StepResult
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK, Script, grant, loop, order
from tests.unit.orchestrator.train.step_mode.recorders import CallAgain

REPLAYED = Ranks(rank=0, world_size=1, device=torch.device("cpu"), step_mode=StepMode.GRAPH, recorder=CallAgain)


def job_of(params: dict[str, object]) -> Job:
    torch.manual_seed(3)
    job = build_job("mlp", params)
    job.prepare()
    # SGD of the job itself is not fused, which a replayed step needs.
    job.build_optimizer = partial(adamw, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)  # type: ignore[method-assign]
    return job


def stepper(ranks: Ranks, tmp_path: Path, **changes: object) -> Stepper:
    trial = order(tmp_path).trial
    assert trial is not None
    trial = replace(trial, start=replace(trial.start, **changes))  # type: ignore[arg-type]
    return Stepper(trial, job_of(trial.params), ranks)


def run(one: Stepper, num_steps: int) -> list[StepResult]:
    results: list[StepResult] = []
    for _ in range(num_steps):
        results += one.advance()
    return results + one.settle()


def same_weights(one: Stepper, other: Stepper) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 2, "grad_accum": 4}])
def test_replayed_steps_train_as_eager_ones_do(tmp_path: Path, changes: dict[str, object]) -> None:
    eager, replayed = stepper(ONE_RANK, tmp_path, **changes), stepper(REPLAYED, tmp_path, **changes)
    wanted, found = run(eager, 80), run(replayed, 80)
    assert [r.step for r in found] == list(range(80))
    assert [r.position for r in found] == [r.position for r in wanted]
    assert {r.mode for r in found[1:]} == {StepMode.GRAPH}
    np.testing.assert_allclose([r.loss for r in found], [r.loss for r in wanted], rtol=1e-6)
    np.testing.assert_allclose([r.grad_norm for r in found], [r.grad_norm for r in wanted], rtol=1e-5)
    assert [r.learning_rate for r in found] == [r.learning_rate for r in wanted]
    assert [r.step for r in found if r.noise is not None] == [33, 49, 65]


@pytest.mark.parametrize("grad_accum", [1, 2, 4])
def test_eager_steps_behind_replayed_ones_begin_without_their_gradients(tmp_path: Path, grad_accum: int) -> None:
    """Dials that are new to a trial begin with a few eager steps, where both modes are measured."""
    ranks = ONE_RANK, replace(REPLAYED, step_mode=StepMode.AUTO)
    changes = {"micro_batch": 8 // grad_accum, "grad_accum": grad_accum}
    eager, replayed = (stepper(each, tmp_path, **changes) for each in ranks)
    wanted, found = run(eager, 12), run(replayed, 12)
    for one, results in ((eager, wanted), (replayed, found)):
        one.turn(replace(one.settings, micro_batch=2, grad_accum=8))
        results.extend(run(one, 12))
    assert StepMode.GRAPH in {r.mode for r in found[:12]}
    assert found[12].mode is StepMode.EAGER
    np.testing.assert_allclose([r.loss for r in found], [r.loss for r in wanted], rtol=1e-5)
    np.testing.assert_allclose([r.grad_norm for r in found], [r.grad_norm for r in wanted], rtol=1e-4)


def casts_in(work: Callable[[], object]) -> int:
    """How many tensors are cast, single numbers not counted."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        work()
    return sum(event.name == "aten::_to_copy" and bool(event.input_shapes[0]) for event in trace.events() or ())


def test_a_replayed_step_in_bf16_casts_no_more_than_autocast_does(tmp_path: Path) -> None:
    one = stepper(REPLAYED, tmp_path, tier=Tier.BF16)
    run(one, 4)
    trial = order(tmp_path).trial
    assert trial is not None
    job = job_of(trial.params)
    model = job.build_model()
    batch = job.batch(np.arange(8), torch.device("cpu"))

    def by_hand() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            terms = job.loss(model, batch)
        (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]

    assert 0 < casts_in(lambda: run(one, 1)) <= casts_in(by_hand)


def test_the_noise_scale_of_replayed_steps_is_that_of_a_pair_of_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {r.step: r.noise for r in run(stepper(REPLAYED, tmp_path), 80) if r.noise is not None}
    eager, seen = stepper(ONE_RANK, tmp_path), {}
    clip = fsdp.clip_and_norm

    def look(params: list[torch.nn.Parameter], *limits: float | None) -> torch.Tensor:
        if eager.step_index in (64, 65):
            weights = weights_of(eager.optimizer, params)
            assert weights is not None
            grads = fsdp.local_grads(params)
            seen[eager.step_index] = [(grad.clone(), weight) for grad, weight in zip(grads, weights, strict=True)]
        return clip(params, *limits)

    monkeypatch.setattr(fsdp, "clip_and_norm", look)
    run(eager, 66)
    pairs = [(first, second, weight) for (first, _), (second, weight) in zip(seen[64], seen[65], strict=True)]
    grad_sq = sum(float((w * a * w * b).sum()) for a, b, w in pairs)
    difference_sq = sum(float((w * (a - b)).square().sum()) for a, b, w in pairs)
    assert list(found) == [33, 49, 65]
    assert found[65].grad_sq == pytest.approx(grad_sq, rel=1e-4)
    assert found[65].noise_trace == pytest.approx(0.5 * 8 * difference_sq, rel=1e-4)


def test_results_come_late_but_never_more_than_a_few_steps(tmp_path: Path) -> None:
    one = stepper(REPLAYED, tmp_path)
    one.advance()
    counts = [len(one.advance()) for _ in range(10)]
    assert counts == [0] * MAX_FLYING + [1] * (10 - MAX_FLYING)
    assert len(one.settle()) == MAX_FLYING
    assert one.settle() == []


def test_a_step_that_is_not_finite_undoes_all_behind_it(tmp_path: Path) -> None:
    one, other = stepper(REPLAYED, tmp_path), stepper(REPLAYED, tmp_path)
    run(one, 4)
    run(other, 4)
    head = next(iter(one.model.parameters()))
    held = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    results = [r for _ in range(MAX_FLYING + 1) for r in one.advance()]
    assert [r.is_skipped for r in results] == [True]
    assert (results[0].step, results[0].num_samples) == (4, 0)
    assert (one.step_index, one.cursor) == (other.step_index, other.cursor), "as if nothing had been begun"
    with torch.no_grad():
        head.copy_(held)
    assert same_weights(one, other)
    assert [r.loss for r in run(one, 3)] == [r.loss for r in run(other, 3)]
    assert same_weights(one, other)


def test_what_cannot_be_recorded_stays_eager_and_says_why(tmp_path: Path) -> None:
    def refuses(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> CallAgain:
        recorder = CallAgain(model, optimizer)
        recorder.refuses = RuntimeError("operation not permitted when stream is capturing\nlong trace")
        return recorder

    one, eager = stepper(replace(REPLAYED, recorder=refuses), tmp_path), stepper(ONE_RANK, tmp_path)
    found, wanted = run(one, 5), run(eager, 5)
    assert {r.mode for r in found} == {StepMode.EAGER}
    assert one.mode_words.startswith("eager: its step cannot be captured (RuntimeError: operation not permitted")
    assert "\n" not in one.mode_words
    np.testing.assert_allclose([r.loss for r in found], [r.loss for r in wanted], rtol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [(ONE_RANK, "eager: graphs need a CUDA device"), (replace(REPLAYED, world_size=2), "collectives of 2 ranks")],
)
def test_why_a_trial_stays_eager(tmp_path: Path, ranks: Ranks, words: str) -> None:
    assert words in stepper(ranks, tmp_path).mode_words


def test_the_faster_mode_is_chosen_by_measurement(tmp_path: Path) -> None:
    one = stepper(replace(REPLAYED, step_mode=StepMode.AUTO), tmp_path)
    results = run(one, 40)
    modes = [r.mode for r in results]
    assert modes[:3] == [StepMode.EAGER] * 3
    assert StepMode.GRAPH in modes
    assert "ms per step" in one.mode_words


def test_recordings_are_bounded_and_reused(tmp_path: Path) -> None:
    made: list[CallAgain] = []

    def remember(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> CallAgain:
        made.append(CallAgain(model, optimizer))
        return made[-1]

    one = stepper(replace(REPLAYED, recorder=remember), tmp_path)
    run(one, 2)
    for place in [*range(2 * MAX_RECORDINGS), 2 * MAX_RECORDINGS - 2]:
        made[0].place = place
        run(one, 2)
    assert made[0].num_recorded == 4 * 2 * MAX_RECORDINGS, "step and noise, two each per place, none for one kept"
    assert one._recorded._replay is not None
    assert one._recorded._replay.captured.num_recordings == MAX_RECORDINGS


def test_a_trial_in_graph_mode_records_what_an_eager_one_does(tmp_path: Path) -> None:
    scripts = []
    for name, ranks in (("eager", ONE_RANK), ("replayed", REPLAYED)):
        first = order(tmp_path / name)
        script = Script(first)
        script.at(7, lambda now: replace(now, grant=grant(2, micro_batch=4, grad_accum=2)))
        assert first.trial is not None
        assert loop(script, job_of(first.trial.params), ranks=ranks).run().status is Status.DONE
        scripts.append(script)
    eager, replayed = scripts[0].records, scripts[1].records
    assert (replayed["flags"][1:] & FLAG_GRAPH).all()
    np.testing.assert_array_equal(replayed["step"], eager["step"])
    np.testing.assert_array_equal(replayed["cursor"], eager["cursor"])
    np.testing.assert_array_equal(replayed["seq"], eager["seq"])
    np.testing.assert_allclose(replayed["loss"], eager["loss"], rtol=1e-5)
    for found, wanted in zip(scripts[1].reports, scripts[0].reports, strict=True):
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-4)
    assert not (replayed["flags"] & FLAG_SKIPPED).any()


def test_what_a_graph_writes_lives_as_long_as_the_graph(tmp_path: Path) -> None:
    made: list[CallAgain] = []

    def forgets(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> CallAgain:
        made.append(CallAgain(model, optimizer))
        made[-1].keeps_work = False
        return made[-1]

    one = stepper(replace(REPLAYED, recorder=forgets), tmp_path, micro_batch=4, grad_accum=2)
    run(one, 3)
    assert made[0].borrowed
    assert all(reference() is not None for reference in made[0].borrowed)


def test_steps_before_the_mode_is_known_are_marked_and_what_was_measured_is_told(tmp_path: Path) -> None:
    first = order(tmp_path, samples_per_report=400)
    assert first.trial is not None
    script = Script(first)
    auto = replace(REPLAYED, step_mode=StepMode.AUTO)
    told: list[StepModeView] = []
    script.outbox.add_mode = told.append  # type: ignore[method-assign, assignment]
    assert loop(script, job_of(first.trial.params), ranks=auto).run().status is Status.DONE
    flags = script.records["flags"]
    assert (flags[:3] & FLAG_UNSETTLED).all(), "eager steps of the trial of modes"
    settled = flags[(flags & FLAG_UNSETTLED) == 0]
    assert len(settled) > 50
    assert len(set((settled & FLAG_GRAPH).tolist())) == 1, "what counts is of one mode"
    (mode,) = told
    assert mode.is_replayed == bool(settled[0] & FLAG_GRAPH)
    assert mode.is_replayed == (mode.replayed_s <= mode.eager_s)
    assert (mode.micro_batch, mode.grad_accum) == (8, 1)


def test_a_tier_that_is_never_replayed_has_a_settled_mode_all_the_same(tmp_path: Path) -> None:
    one = stepper(replace(REPLAYED, step_mode=StepMode.AUTO), tmp_path, tier=Tier.FP16)
    assert {r.mode for r in run(one, 12)} == {StepMode.EAGER}
    assert one.is_settled_on(StepMode.EAGER)
    assert "fp16" in one.mode_words
    assert one.measured_mode is None
