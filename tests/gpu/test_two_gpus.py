"""Two ranks over NCCL, each on a GPU of its own, train as one rank does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bench.card_ranks import RankPlan, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs that torch can use"),
]
LANGUAGE = {"width": 64, "layers": 2, "heads": 2, "context": 64}


def plan(directory: Path, world_size: int, micro_batch: int) -> RankPlan:
    return RankPlan(
        directory=directory, params=LANGUAGE, micro_batch=micro_batch, tier="fp32", world_size=world_size, num_steps=20
    )


def test_two_ranks_over_nccl_have_the_losses_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    (one,) = train(plan(tmp_path, 1, 8))
    two = train(plan(tmp_path, 2, 4))
    assert two[0]["card"] != two[1]["card"]
    both = np.mean([rank["losses"] for rank in two], axis=0)
    np.testing.assert_allclose(both, one["losses"], rtol=1e-3)
