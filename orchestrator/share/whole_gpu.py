"""GPU shares without a cap on compute: side by side under MPS, or in turns without it.

With trials that are alike no cap is the best for their sum (measured: caps cost 12 to 17 %), so this is what a GPU is
shared by unless somebody needs protection. The share is what the ledger counts; how fast a trial runs is measured.
Memory may be capped all the same. Used through `orchestrator.share.SHARES`, in the process of one rank.
"""

from __future__ import annotations

from typing import ClassVar

from orchestrator.errors import ShareError
from orchestrator.share.cuda_memory import AllocatorCap, MemoryCap
from orchestrator.share.mechanism import Enforcement


class TimeSlice:
    """The GPU's own scheduling: processes take turns, each with the whole device.

    Args:
        memory: what caps memory.
        memory_fraction: part of the GPU's memory this process may take, None for all of it.
    """

    name: ClassVar[str] = "time_slice"
    _note: ClassVar[str] = (
        "compute is not enforced: processes take turns on the whole GPU, in equal parts whatever the share"
    )

    def __init__(self, memory: MemoryCap | None = None, *, memory_fraction: float | None = None) -> None:
        self._memory: MemoryCap = AllocatorCap() if memory is None else memory
        self._fraction = memory_fraction
        self._is_capped = False

    @property
    def num_units(self) -> int:
        """One: the GPU is not cut."""
        return 1

    @property
    def key(self) -> None:
        """Every grant runs in the same place: a captured graph outlives a change of share."""
        return None

    @property
    def enforcement(self) -> Enforcement:
        """Memory where a cap was asked for, nothing else."""
        return Enforcement(compute=False, memory=self._fraction is not None, live=True, note=self._note)

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        """Accept a grant; the first one caps memory.

        Raises:
            ShareError: no unit, or an amount that is not positive.
        """
        if not units or not amount > 0:
            raise ShareError(f"a grant of amount={amount:g} on units={list(units)} is no share; allowed: above 0")
        if self._fraction is not None and not self._is_capped:
            self._memory.set(self._fraction)
            self._is_capped = True

    def hold_back(self) -> float:
        """Never sleeps."""
        return 0.0

    def wake(self) -> None:
        """Nothing sleeps, nothing to wake."""

    def charged_s(self) -> float:
        """Nothing is counted."""
        return 0.0

    def release(self) -> None:
        """Lift the cap on memory."""
        if self._is_capped:
            self._memory.set(1.0)
            self._is_capped = False


class Mps(TimeSlice):
    """NVIDIA's Multi-Process Service without limits: kernels of several processes run at the same time."""

    name: ClassVar[str] = "mps"
    _note: ClassVar[str] = (
        "compute is not enforced: kernels of all trials run side by side under MPS, and a busy neighbour slows a trial"
    )
