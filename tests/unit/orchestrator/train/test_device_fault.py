"""Which errors mean that a process can compute no more."""

from __future__ import annotations

import pytest

from orchestrator.train.device_fault import is_device_fault


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: device-side assert triggered",
        "CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_a_dead_context_is_a_fault(text: str) -> None:
    assert is_device_fault(RuntimeError(text))
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = RuntimeError(text)
    assert is_device_fault(wrapped)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "an illegal memory access",
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: operation not permitted when stream is capturing",
    ],
)
def test_what_a_process_survives_is_none(text: str) -> None:
    assert not is_device_fault(RuntimeError(text))
