"""Training on a real GPU: the loop, its tiers and its checkpoints give what they give on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.control.orders import SlotOrder, Status, StopMode
from orchestrator.jobs import build_job
from orchestrator.policies.tier import Tier
from orchestrator.train.groups import Ranks
from tests.unit.orchestrator.train.links import ONE_RANK, Script, grant, loop, order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]

ON_GPU = Ranks(rank=0, world_size=1, device=torch.device("cuda"))


def run(first: SlotOrder, ranks: Ranks, stop_after: int | None = None) -> tuple[Script, str | None]:
    """Run an attempt; the script it left and the checkpoint it was interrupted with, if it was."""
    script = Script(first)
    if stop_after is not None:
        script.at(stop_after, lambda now: replace(now, stop=StopMode.CHECKPOINT))
    assert first.trial is not None
    torch.manual_seed(first.trial.seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    outcome = loop(script, job, ranks=ranks).run()
    assert outcome.status is (Status.DONE if stop_after is None else Status.INTERRUPTED)
    return script, outcome.checkpoint


def test_a_checkpoint_from_a_cpu_trains_on_a_gpu_with_the_same_losses(tmp_path: Path) -> None:
    whole, _ = run(order(tmp_path / "cpu"), ONE_RANK)
    first = order(tmp_path / "moved")
    begun, checkpoint = run(first, ONE_RANK, stop_after=10)
    assert first.trial is not None
    resumed = replace(first, trial=replace(first.trial, attempt=1, resume_from=checkpoint))
    rest, _ = run(resumed, ON_GPU)
    losses = np.concatenate([begun.records["loss"], rest.records["loss"]])
    np.testing.assert_allclose(losses, whole.records["loss"], rtol=1e-4)


def test_bf16_stays_close_to_fp32_on_a_gpu(tmp_path: Path) -> None:
    first = order(tmp_path / "fp32")
    script, checkpoint = run(first, ON_GPU, stop_after=10)
    assert len(script.records) == 10
    assert first.trial is not None
    resumed = replace(first, trial=replace(first.trial, attempt=1, resume_from=checkpoint))
    assert resumed.trial is not None
    other = replace(resumed.trial, directory=str(tmp_path / "bf16"))
    bf16, _ = run(replace(resumed, trial=other, grant=grant(2, tier=Tier.BF16)), ON_GPU)
    fp32, _ = run(resumed, ON_GPU)  # last: its commits replace the one both begin from
    np.testing.assert_allclose(bf16.records["loss"], fp32.records["loss"], rtol=0.05)
    assert (bf16.records["loss"] != fp32.records["loss"]).any(), "the tier really changed"
