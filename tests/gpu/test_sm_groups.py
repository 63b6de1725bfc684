"""SM groups on a real GPU: cut in hardware, changed live, and what is trained stays the same."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.errors import ShareError
from orchestrator.share.sm_driver import CudaSmDriver
from orchestrator.share.sm_groups import SmGroups
from tests.bench.gpu_job import run_ours
from tests.unit.orchestrator.train.links import Script, grant, order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]


@pytest.fixture
def share() -> SmGroups:
    try:
        return SmGroups()
    except ShareError as error:
        pytest.skip(f"no SM groups here: {error}")


def products_s(count: int = 6) -> float:
    a = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        a @ a
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(count):
        a @ a
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


def test_fewer_groups_compute_slower(share: SmGroups) -> None:
    assert share.num_units == CudaSmDriver().num_groups() >= 2
    seconds = {}
    for groups in (share.num_units, share.num_units // 4):
        share.apply(tuple(range(groups)), float(groups))
        seconds[groups] = products_s()
    share.release()
    few, all_of_them = seconds[share.num_units // 4], seconds[share.num_units]
    assert few > 2.5 * all_of_them


@pytest.mark.parametrize("mode", ["eager", "graph", "compiled"])
def test_live_changes_leave_the_losses_alone(share: SmGroups, tmp_path: Path, mode: str) -> None:
    def change(outside: Script) -> None:
        for number, groups in enumerate([(0, 1, 2), (1, 2, 3, 4, 5), (7,), (0, 1, 2)]):
            given = replace(grant(number + 2), units=(groups,), amount=float(len(groups)))
            outside.at(8 * (number + 1), lambda now, given=given: replace(now, grant=given))  # type: ignore[misc]

    first = order(tmp_path / "changed", samples_per_report=8 * 30)
    assert first.trial is not None
    language = {"width": 64, "layers": 2, "heads": 2, "context": 64, "eval_windows": 8}
    first = replace(first, trial=replace(first.trial, job="language", params=language))
    still = run_ours(first, mode=mode).records
    changed = run_ours(first, mode=mode, share=share, script=change).records
    assert (changed["switch_s"] > 0).sum() == 4
    np.testing.assert_allclose(changed["loss"], still["loss"], rtol=2e-4)


def test_memory_comes_back_after_a_trial(tmp_path: Path) -> None:
    import gc

    before = torch.cuda.memory_allocated()
    run_ours(order(tmp_path), mode="graph")
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
