"""A share that is only written down: nothing holds the rank to it.

For machines on which no mechanism works, and for runs that want the bookkeeping without the limits.
Used through `orchestrator.share.SHARES`.
"""

from __future__ import annotations

from typing import ClassVar

from orchestrator.errors import ShareError
from orchestrator.share.mechanism import Enforcement


class Logical:
    """Accepts every legal grant and enforces none."""

    name: ClassVar[str] = "logical"

    @property
    def enforcement(self) -> Enforcement:
        """Nothing is enforced."""
        return Enforcement(
            compute=False,
            memory=False,
            live=True,
            note="nothing is enforced: the share is bookkeeping, and a rank may use the whole device",
        )

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        """Accept a grant.

        Raises:
            ShareError: no unit, or an amount that is not positive.
        """
        if not units or not amount > 0:
            raise ShareError(
                f"a grant of amount={amount} on units={units} is not a share; allowed: at least one unit and an "
                "amount > 0; a pause is kept at the boundary, not by a mechanism"
            )

    def hold_back(self) -> float:
        """Never sleeps."""
        return 0.0

    def wake(self) -> None:
        """Nothing sleeps, nothing to wake."""

    def charged_s(self) -> float:
        """Nothing is charged."""
        return 0.0

    def release(self) -> None:
        """Nothing was changed."""
