"""CPU seconds a process really uses under a CPU share; the bounds are wide, the figure itself is measured elsewhere."""

from __future__ import annotations

import os
import time

import pytest
import torch

from orchestrator.share.cpu_cores import CpuCores

SECONDS = 2.0


@pytest.mark.bench
@pytest.mark.parametrize("amount", [0.25, 0.5, 1.0, 1.5])
def test_a_process_uses_the_cpu_time_of_its_share(amount: float) -> None:
    units = tuple(range(2 if amount > 1 else 1))
    if len(units) > len(os.sched_getaffinity(0)):
        pytest.skip(f"{amount} cores need {len(units)} cores")
    weights = torch.randn(256, 256)
    share = CpuCores()
    threads_before, cores_before = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        share.apply(units, amount)
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        while time.monotonic() - began_s < SECONDS:
            for _ in range(10):
                weights = torch.tanh(weights @ weights)
            share.hold_back()
        ratio = (time.process_time() - began_cpu_s) / (amount * (time.monotonic() - began_s))
    finally:
        share.release()
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads_before, cores_before)
    assert ratio <= 1.1
    # Whoever else computes on this machine takes from a large share; a small one must come through.
    assert ratio >= (0.8 if amount < 1 else 0.3), f"{ratio:.3f} of the share {amount}"
