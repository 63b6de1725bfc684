"""Which mechanism a node gets, and the reason against each better one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.devices.choice import GpuFacts, GpuShare, choose, gpu_facts
from orchestrator.share.mps import MpsFound

GOOD = GpuFacts(driver_version=13_000, has_bindings=True, running_mps=None, can_start_mps=True, is_mig=False)
LIMITED = MpsFound(environment={"CUDA_MPS_PIPE_DIRECTORY": "/x"}, is_own=False, limits="25 % of the SMs per process")


@pytest.mark.parametrize(
    ("wish", "turns", "facts", "share", "words"),
    [
        ("auto", True, GOOD, "sm_groups", "sm_groups"),
        ("auto", False, GOOD, "mps", "mps; no sm_groups: no dial of this run turns shares"),
        ("sm_groups", False, GOOD, "sm_groups", "sm_groups"),
        ("mps", True, GOOD, "mps", "mps"),
        ("time_slice", True, GOOD, "time_slice", "time_slice"),
        ("auto", True, replace(GOOD, driver_version=12_030), "mps", "the driver is for CUDA 12.3; green contexts"),
        ("auto", True, replace(GOOD, has_bindings=False), "mps", "the package cuda-bindings is missing"),
        ("auto", True, replace(GOOD, can_start_mps=False), "time_slice", "no nvidia-cuda-mps-control on the PATH"),
        ("auto", True, replace(GOOD, driver_version=None), "time_slice", "there is no CUDA driver"),
        ("sm_groups", True, replace(GOOD, is_mig=True), "time_slice", "MIG instances, which are cut already"),
        ("auto", True, replace(GOOD, running_mps=LIMITED), "mps", "limits clients (25 % of the SMs per process)"),
        ("mps", True, replace(GOOD, running_mps=LIMITED, can_start_mps=False), "mps", "mps"),
    ],
)
def test_the_best_that_works_and_why_no_better(wish: str, turns: bool, facts: GpuFacts, share: str, words: str) -> None:
    choice = choose(GpuShare(wish), facts, turns_shares=turns)
    assert choice.share == share
    assert words in choice.words


@pytest.mark.parametrize("visible", ["MIG-0a1b", "MIG-0a1b,MIG-2c3d", " MIG-0a1b"])
def test_mig_instances_are_seen(visible: str, tmp_path: Path) -> None:
    assert gpu_facts({"CUDA_VISIBLE_DEVICES": visible, "PATH": str(tmp_path)}).is_mig


@pytest.mark.parametrize("visible", ["", "0,1", "GPU-11517b25-136c-2971-0c78-11f359eca619"])
def test_numbers_and_uuids_are_no_instances(visible: str, tmp_path: Path) -> None:
    facts = gpu_facts({"CUDA_VISIBLE_DEVICES": visible, "PATH": str(tmp_path)})
    assert not facts.is_mig
    assert not facts.can_start_mps
