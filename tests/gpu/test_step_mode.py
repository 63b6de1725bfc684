"""Steps replayed from CUDA graphs give what eager steps give, and a model that cannot be captured says so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import FLAG_COMPILED, FLAG_GRAPH
from orchestrator.train.groups import Ranks
from orchestrator.train.isolation import ProcessState
from orchestrator.train.precision.calibrate import time_replays
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.recorder import CudaRecorder
from orchestrator.train.stepper import Stepper
from tests.bench.gpu_job import run_ours
from tests.unit.orchestrator.train.links import Script, grant, order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]
LANGUAGE = {"width": 64, "layers": 2, "heads": 2, "context": 64, "eval_windows": 8}


def language_order(directory: Path, num_steps: int = 60) -> Any:
    first = order(directory, samples_per_report=8 * num_steps)
    assert first.trial is not None
    return replace(first, trial=replace(first.trial, job="language", params=LANGUAGE, max_reports=1))


def turn_batch_and_tier(outside: Script) -> None:
    """The batch is cut in two at step 20, and the tier turns at step 40."""
    outside.at(20, lambda now: replace(now, grant=grant(2, micro_batch=4, grad_accum=2)))
    outside.at(40, lambda now: replace(now, grant=grant(3, tier=Tier.BF16)))


def test_graph_steps_train_as_eager_ones_do(tmp_path: Path) -> None:
    eager = run_ours(language_order(tmp_path / "e"), mode="eager", script=turn_batch_and_tier).records
    graph = run_ours(language_order(tmp_path / "g"), mode="graph", script=turn_batch_and_tier).records
    assert (graph["flags"][1:] & FLAG_GRAPH).all()
    np.testing.assert_array_equal(graph["cursor"], eager["cursor"])
    np.testing.assert_allclose(graph["loss"][:40], eager["loss"][:40], rtol=1e-4)
    np.testing.assert_allclose(graph["loss"][40:], eager["loss"][40:], rtol=5e-3)
    np.testing.assert_allclose(graph["grad_norm"][:40], eager["grad_norm"][:40], rtol=1e-3)


def test_compiled_steps_train_as_eager_ones_do_and_leave_nothing_behind(tmp_path: Path) -> None:
    eager = run_ours(language_order(tmp_path / "e"), mode="eager", script=turn_batch_and_tier).records
    clean = ProcessState.capture()
    compiled = run_ours(language_order(tmp_path / "c"), mode="compiled", script=turn_batch_and_tier).records
    assert clean.leaks() == ()
    assert (compiled["flags"][1:] & FLAG_COMPILED).all()
    np.testing.assert_array_equal(compiled["cursor"], eager["cursor"])
    np.testing.assert_allclose(compiled["loss"][:40], eager["loss"][:40], rtol=1e-3)
    np.testing.assert_allclose(compiled["loss"][40:], eager["loss"][40:], rtol=1e-2)
    np.testing.assert_allclose(compiled["grad_norm"][:40], eager["grad_norm"][:40], rtol=5e-3)


def test_a_model_that_cannot_be_compiled_is_replayed_as_it_is(tmp_path: Path) -> None:
    one = stepper(tmp_path, StepMode.COMPILED)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def nothing(_module: object, _inputs: object) -> None:
        """What torch must not look into."""

    one.model.register_forward_pre_hook(nothing)
    results = [result for _ in range(6) for result in one.advance()]
    # The step at which it failed was done all the same.
    assert [result.mode for result in results[:2]] == [StepMode.EAGER] * 2
    assert {result.mode for result in results[2:]} == {StepMode.GRAPH}
    assert one.mode_words.startswith("graph; not compiled: (")
    assert all(np.isfinite(result.loss) for result in results)


def stepper(tmp_path: Path, mode: StepMode) -> Stepper:
    trial = language_order(tmp_path).trial
    torch.manual_seed(0)
    job = build_job("language", LANGUAGE)
    job.prepare()
    return Stepper(trial, job, Ranks(rank=0, world_size=1, device=torch.device("cuda"), step_mode=mode))


def test_a_model_that_cannot_be_captured_goes_on_eagerly(tmp_path: Path) -> None:
    one = stepper(tmp_path, StepMode.GRAPH)

    def asks_the_device(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * (1.0 if float(output.detach().sum()) < 1e30 else 0.0)

    one.model.register_forward_hook(asks_the_device)
    results = [result for _ in range(6) for result in one.advance()]
    assert [result.mode for result in results] == [StepMode.EAGER] * 6
    assert one.mode_words.startswith("eager: its step cannot be captured")
    assert all(np.isfinite(result.loss) for result in results)


def test_a_recorder_goes_on_after_its_last_recording_was_dropped() -> None:
    recorder, x = CudaRecorder(), torch.zeros(8, device="cuda")

    def add_two() -> None:
        x.add_(torch.ones_like(x) * 2)

    for number in range(3):
        replay = recorder.record(add_two)
        replay()
        torch.cuda.synchronize()
        del replay
        assert float(x[0]) == 2.0 * (number + 1)


def test_tiers_are_calibrated_on_replays(tmp_path: Path) -> None:
    one = stepper(tmp_path, StepMode.AUTO)
    tiers = (Tier.FP32, Tier.TF32, Tier.BF16)
    batch = one.probe_batch(4)
    recorder, replays = CudaRecorder(), {}
    for tier in tiers:  # raises where a tier cannot be recorded
        recorder.rehearse(partial(one.add_gradient, batch, tier))
        one.optimizer.zero_grad(set_to_none=True)
        replays[tier] = recorder.record(partial(one.add_gradient, batch, tier))
        one.optimizer.zero_grad(set_to_none=True)
    assert all(seconds > 0 for seconds in time_replays(replays).values())


def test_a_step_that_is_not_finite_changes_nothing_in_a_graph(tmp_path: Path) -> None:
    one = stepper(tmp_path, StepMode.GRAPH)
    for _ in range(8):
        one.advance()
    one.settle()
    weights = [param.detach().clone() for param in one.model.parameters()]
    head = next(iter(one.model.parameters()))
    held = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("inf"))
    results = [result for _ in range(6) for result in one.advance()]
    skipped = next(result for result in results if result.is_skipped)
    assert skipped.step == 8
    one.settle()
    with torch.no_grad():
        head.copy_(held)
    assert all(torch.equal(a, b) for a, b in zip(weights, one.model.parameters(), strict=True))
