"""Whether a GPU has room is first read, and tried only where memory is scarce."""

from __future__ import annotations

import pytest
import torch

from orchestrator.train.batch.memory import CudaGauge

DEVICE = torch.device("cpu")  # on which the allocation that is tried can be made here


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU with 1,000 bytes that nobody uses, and 100 allocated by this process; how often its cache was emptied."""
    calls: list[str] = []
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _device: 100)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (1000, 5000))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("emptied"))
    return calls


@pytest.mark.parametrize("needed_bytes", [50, 100, 600])
def test_where_there_is_plenty_the_cache_is_kept(emptied: list[str], needed_bytes: int) -> None:
    assert CudaGauge(DEVICE).can_hold(needed_bytes)
    assert not emptied


def test_where_memory_is_scarce_it_is_tried(emptied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert CudaGauge(DEVICE).can_hold(1000)
    assert emptied == ["emptied", "emptied"], "before and after the ballast"

    def refuse(*_size: object, **_options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("torch.empty", refuse)
    assert not CudaGauge(DEVICE).can_hold(1000)
