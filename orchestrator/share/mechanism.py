"""The seam between a granted share and what holds a rank to it.

A mechanism lives in the process of one rank, as long as that process serves trials. It knows units and amounts, never
trials, plans or other ranks: who may use which unit is decided centrally (`share.packing`). Called by the training loop
at step boundaries; `orchestrator.share.SHARES` names the implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Enforcement:
    """What a mechanism truly enforces on this machine, for people and for the journal.

    Attributes:
        compute: whether a rank is kept from computing more than its amount.
        memory: whether a rank is kept from using more memory than its part.
        live: whether the amount changes at a step boundary, without a restart.
        note: one sentence that says how, and what is left out.
    """

    compute: bool
    memory: bool
    live: bool
    note: str


class ShareMechanism(Protocol):
    """Holds the calling process to a share of one device. All but `wake` belong to the training thread."""

    name: ClassVar[str]

    @property
    def enforcement(self) -> Enforcement:
        """What is enforced; may change with the first `apply`, which finds out what the machine allows."""
        ...

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        """Grant `amount` units' worth of compute on `units`, from now on; takes less than 10 ms.

        Args:
            units: ids of the device's units that this rank may touch, counted from 0 on the device.
            amount: how many units' worth it may use, > 0, at most as many as `units`; may be fractional.

        Raises:
            ShareError: a unit that the device does not have, or an amount that does not fit the units.
        """
        ...

    def hold_back(self) -> float:
        """Settle the account of the step that ends here: sleep as long as it overdrew. Returns seconds slept."""
        ...

    def wake(self) -> None:
        """End the sleep of `hold_back` now, or skip the next one; what is owed stays owed. From any thread."""
        ...

    def charged_s(self) -> float:
        """Seconds of compute charged since the first `apply`; 0 where nothing is counted."""
        ...

    def release(self) -> None:
        """Give the process back what it had before the first `apply`; harmless when called again."""
        ...
