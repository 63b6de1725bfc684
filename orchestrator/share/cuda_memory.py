"""The memory part of a GPU share: how much of the card torch's allocator may take in this process.

A cap of the allocator, not of the card: what the context, libraries and NCCL take outside it is not counted. It can be
raised and lowered at any time. Used by the GPU mechanisms; a seam for their tests.
"""

from __future__ import annotations

from typing import Protocol

from orchestrator.errors import ShareError


class MemoryCap(Protocol):
    """Limits what the process takes of the GPU's memory."""

    def set(self, fraction: float) -> None:
        """Allow that fraction of the GPU's memory, (0, 1]."""
        ...


class AllocatorCap:
    """The cap of torch's caching allocator. Going below what is in use makes the next allocation fail, not this."""

    def set(self, fraction: float) -> None:
        """Allow that fraction of the GPU's memory.

        Raises:
            ShareError: not a fraction.
        """
        import torch

        if not 0 < fraction <= 1:
            raise ShareError(f"memory fraction {fraction}; allowed: above 0, at most 1")
        torch.cuda.set_per_process_memory_fraction(fraction)
