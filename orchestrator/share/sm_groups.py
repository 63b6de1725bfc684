"""A share of a GPU that is cut in hardware and changed between two steps: the SM groups of green contexts.

`apply` makes a stream over the granted groups the current one; everything that is launched from then on (forward,
backward, optimizer, or a graph captured there) runs on those SMs only. Outside of it: streams that others make (those
of FSDP2's collectives, of NCCL), copies between host and device, L2 and memory bandwidth. Disjoint groups are the
ledger's word (`share.grouping`). Two processes run at the same time only under MPS; without it they take turns.
Used through `orchestrator.share.SHARES`, in the process of one rank.
"""

from __future__ import annotations

from typing import ClassVar

from orchestrator.errors import ShareError
from orchestrator.share.cuda_memory import AllocatorCap, MemoryCap
from orchestrator.share.mechanism import Enforcement
from orchestrator.share.sm_driver import CudaSmDriver, Lane, SmDriver

MAX_KEPT_LANES = 8
"""Lanes kept from one trial to the next. Within a trial none is closed: graphs captured in it would be left behind."""

_NOTE = (
    "kernels of the step run on the granted SM groups only, cut in hardware and disjoint; outside are copies, "
    "collectives' own streams, L2 and memory bandwidth"
)
_ALONE = "; without MPS the processes take turns, so groups protect nobody"


class SmGroups:
    """Holds this process to some SM groups of its GPU.

    Args:
        driver: the GPU's; None for the one torch computes on, opened when it is first needed.
        memory: what caps memory.
        memory_fraction: part of the GPU's memory this process may take, None for all of it.
        is_under_mps: whether other processes of the GPU can run at the same time.

    """

    name: ClassVar[str] = "sm_groups"

    def __init__(
        self,
        driver: SmDriver | None = None,
        memory: MemoryCap | None = None,
        *,
        memory_fraction: float | None = None,
        is_under_mps: bool = True,
    ) -> None:
        self._opened = driver
        self._memory: MemoryCap = AllocatorCap() if memory is None else memory
        self._fraction, self._is_under_mps = memory_fraction, is_under_mps
        self._lanes: dict[tuple[int, ...], Lane] = {}
        self._is_capped = False
        self._current: tuple[int, ...] | None = None

    @property
    def _driver(self) -> SmDriver:
        if self._opened is None:
            self._opened = CudaSmDriver()
        return self._opened

    @property
    def num_units(self) -> int:
        """SM groups of the GPU.

        Raises:
            ShareError: the driver or the GPU has no green contexts.
        """
        return self._driver.num_groups()

    @property
    def enforcement(self) -> Enforcement:
        """Compute always; memory where a cap was asked for."""
        return Enforcement(
            compute=self._is_under_mps,
            memory=self._fraction is not None,
            live=True,
            note=_NOTE if self._is_under_mps else _NOTE + _ALONE,
        )

    @property
    def key(self) -> tuple[int, ...] | None:
        """The groups in use: a captured graph belongs to them. None before the first grant and after the release."""
        return self._current

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        """Run on exactly those groups from now on; 1 to 3 ms for groups that are new, else microseconds.

        Raises:
            ShareError: groups the GPU does not have, or an amount that is not their number.
        """
        groups = tuple(sorted(set(units)))
        if not groups or groups[0] < 0 or groups[-1] >= self.num_units or not abs(amount - len(groups)) < 1e-3:
            raise ShareError(
                f"a grant of amount={amount:g} on SM groups {list(units)} cannot be kept; allowed: whole groups of 0 "
                f"to {self.num_units - 1}, and their number as the amount"
            )
        if self._fraction is not None and not self._is_capped:
            self._memory.set(self._fraction)
            self._is_capped = True
        if groups == self._current:
            return
        lane = self._lanes.get(groups)
        if lane is None:
            lane = self._lanes[groups] = self._driver.open(groups)
        self._lanes[groups] = self._lanes.pop(groups)  # the newest last
        self._driver.enter(lane)
        self._current = groups

    def hold_back(self) -> float:
        """Never sleeps: the SMs are the limit."""
        return 0.0

    def wake(self) -> None:
        """Nothing sleeps, nothing to wake."""

    def charged_s(self) -> float:
        """Nothing is counted."""
        return 0.0

    def release(self) -> None:
        """Back to the whole device; the newest lanes are kept for the next trial, the others closed."""
        if self._current is not None:
            self._driver.enter(None)
        self._current = None
        if self._is_capped:
            self._memory.set(1.0)
            self._is_capped = False
        for groups in list(self._lanes)[: max(0, len(self._lanes) - MAX_KEPT_LANES)]:
            self._driver.close(self._lanes.pop(groups))
