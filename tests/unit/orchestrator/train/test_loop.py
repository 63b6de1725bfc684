"""The training loop without Ray: dials turn at boundaries, nothing is lost, and trials protect themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.control.orders import SlotOrder, Status, StopMode
from orchestrator.errors import ApplyError
from orchestrator.jobs import build_job
from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.mlp import MlpJob
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import FLAG_APPLIED, FLAG_SKIPPED, TIERS
from orchestrator.train.precision.linear import PrecisionLinear
from tests.unit.orchestrator.train.links import FakeShare, Script, grant, loop, order


def job_of(first: SlotOrder) -> object:
    assert first.trial is not None
    torch.manual_seed(first.trial.seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    return job


def run(first: SlotOrder, *changes: tuple[int, object]) -> Script:
    script = Script(first)
    for num_steps, change in changes:
        script.at(num_steps, change)  # type: ignore[arg-type]
    outcome = loop(script, job_of(first)).run()
    assert outcome.status is Status.DONE
    script.collect()
    return script


def test_a_trial_reports_commits_and_ends(tmp_path: Path) -> None:
    script = run(order(tmp_path))
    assert [(report.index, report.num_samples) for report in script.reports] == [(0, 160), (1, 320)]
    assert all(report.checkpoint is not None and Path(report.checkpoint).is_dir() for report in script.reports)
    assert script.reports[1].metrics["val_loss"] < script.reports[0].metrics["val_loss"] * 1.5


def test_every_sample_is_in_exactly_one_record(tmp_path: Path) -> None:
    change = lambda now: replace(now, grant=grant(2, micro_batch=16))  # noqa: E731
    records = run(order(tmp_path), (7, change)).records
    ends = records["cursor"] + records["num_samples"]
    assert records["cursor"][0] == 0
    assert (records["cursor"][1:] == ends[:-1]).all()
    assert (records["seq"] == np.arange(len(records))).all()


def test_all_dials_turn_at_the_next_boundary_and_are_acknowledged(tmp_path: Path) -> None:
    share = FakeShare()
    first = order(tmp_path)
    script = Script(first)
    turned = grant(2, share=0.25, micro_batch=16, tier=Tier.BF16)
    script.at(5, lambda now: replace(now, grant=turned))
    loop(script, job_of(first), share).run()
    records = script.records
    before, after = records[:5], records[5:]
    assert set(before["micro_batch"]) == {8}
    assert set(after["micro_batch"]) == {16}
    assert set(after["tier"]) == {TIERS.index(Tier.BF16)}
    assert after["flags"][0] & FLAG_APPLIED
    assert not (after["flags"][1:] & FLAG_APPLIED).any()
    assert [(ack.generation, ack.step) for ack in script.acks] == [(1, 0), (2, 5)]
    assert share.applied == [((0,), 1.0), ((0,), 1.0)]


def test_an_older_generation_is_not_applied(tmp_path: Path) -> None:
    newer = lambda now: replace(now, grant=grant(5, micro_batch=16))  # noqa: E731
    older = lambda now: replace(now, grant=grant(4, micro_batch=32))  # noqa: E731
    records = run(order(tmp_path), (3, newer), (6, older)).records
    assert set(records["micro_batch"]) == {8, 16}


def test_accumulation_gives_the_same_losses_as_one_batch(tmp_path: Path) -> None:
    whole = run(order(tmp_path / "a")).records
    split = run(order(tmp_path / "b", grant=grant(1, micro_batch=2, grad_accum=4))).records
    np.testing.assert_allclose(whole["loss"], split["loss"], rtol=1e-5)


def test_a_stopped_trial_leaves_without_a_commit(tmp_path: Path) -> None:
    first = order(tmp_path)
    script = Script(first)
    script.at(4, lambda now: replace(now, stop=StopMode.DISCARD))
    outcome = loop(script, job_of(first)).run()
    assert (outcome.status, outcome.step) == (Status.STOPPED, 4)
    assert not (tmp_path / "checkpoints").exists()


def test_an_interrupted_trial_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    undisturbed = run(order(tmp_path / "a")).records
    first = order(tmp_path / "b")
    script = Script(first)
    script.at(13, lambda now: replace(now, stop=StopMode.CHECKPOINT))
    outcome = loop(script, job_of(first)).run()
    assert outcome.status is Status.INTERRUPTED
    assert outcome.checkpoint is not None
    assert first.trial is not None
    again = replace(first, trial=replace(first.trial, attempt=1, resume_from=outcome.checkpoint))
    rest = run(again).records
    losses = np.concatenate([script.records["loss"], rest["loss"]])
    assert (losses == undisturbed["loss"]).all(), "bit-equal to the undisturbed run"


def test_a_trial_waits_for_credit(tmp_path: Path) -> None:
    first = order(tmp_path, credit=1)
    script = Script(first)
    script.at(20, lambda now: now)  # the report is due after 20 steps
    taken = []
    wait = script.wait

    def grant_credit(version: int, timeout_s: float) -> None:
        script.collect()
        taken.append(len(script.reports))
        script._order = replace(script._order, credit=2)
        script.version += 1
        wait(version, timeout_s)

    script.wait = grant_credit  # type: ignore[method-assign]
    outcome = loop(script, job_of(first)).run()
    assert outcome.status is Status.DONE
    assert taken == [1], "it waited once, after its first report"


def test_a_trial_without_a_share_waits_at_its_boundary_and_goes_on_where_it_was(tmp_path: Path) -> None:
    undisturbed = run(order(tmp_path / "a")).records
    first = order(tmp_path / "b")
    script, share = Script(first), FakeShare()
    script.at(9, lambda now: replace(now, grant=grant(2, share=0.0)))
    wait = script.wait

    def resume(version: int, timeout_s: float) -> None:
        script._order = replace(script._order, grant=grant(3))
        script.version += 1
        wait(version, timeout_s)

    script.wait = resume  # type: ignore[method-assign]
    loop(script, job_of(first), share).run()
    assert (script.records["loss"] == undisturbed["loss"]).all()
    assert [ack.generation for ack in script.acks] == [1, 2, 3]
    assert len(share.applied) == 2, "nothing is applied for a pause"


class SickJob(MlpJob):
    """Its loss is not finite wherever a layer computes in one of the sick tiers."""

    def __init__(self, sick: Sequence[Tier]) -> None:
        super().__init__(width=16, num_samples=512)
        self._sick = sick

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        terms = super().loss(model, batch)
        tier = next(layer.tier for layer in model.modules() if isinstance(layer, PrecisionLinear))
        if tier in self._sick:
            return LossTerms(loss_sum=terms.loss_sum * float("nan"), num_elements=terms.num_elements)
        return terms


def test_a_non_finite_gradient_raises_the_tier_at_once_and_loses_no_sample(tmp_path: Path) -> None:
    first = order(tmp_path)
    script = Script(first)
    script.at(5, lambda now: replace(now, grant=grant(2, tier=Tier.BF16)))
    job = SickJob([Tier.BF16])
    job.prepare()
    outcome = loop(script, job).run()
    assert outcome.status is Status.DONE
    records = script.records
    skipped = records[(records["flags"] & FLAG_SKIPPED) != 0]
    assert len(skipped) == 1
    assert (skipped["tier"][0], skipped["num_samples"][0]) == (TIERS.index(Tier.BF16), 0)
    assert [override.settings.tier for override in script.overrides] == [Tier.FP32]
    assert "non-finite loss at step 5" in script.overrides[0].reason
    trained = records[(records["flags"] & FLAG_SKIPPED) == 0]
    assert (trained["cursor"][1:] == (trained["cursor"] + trained["num_samples"])[:-1]).all()
    assert np.isfinite(trained["loss"]).all()


def test_a_trial_that_diverges_in_the_dearest_tier_fails_by_name(tmp_path: Path) -> None:
    first = order(tmp_path)
    job = SickJob([Tier.FP32, Tier.BF16])
    job.prepare()
    with pytest.raises(ApplyError, match="t diverged: the gradient at step 0 was not finite 3 times in fp32"):
        loop(Script(first), job).run()
    assert not (tmp_path / "checkpoints").exists(), "nothing that is not finite is committed"
