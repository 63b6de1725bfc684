"""Whether what a user's function raises may come of a turn to a cheaper tier, which it never asked for.

Code that is right in the tier it began in can raise in a cheaper one: NumPy knows no bf16, and two dtypes may not meet
in one operation. Until a report was made in a tier, any error there counts as that tier's; after it, only one whose
text names a 16-bit type, since other code may run between two later reports. Called by the driver; the attempt then
begins again in the start tier, once.
"""

from __future__ import annotations

import re

from orchestrator.errors import FunctionError, TierError
from orchestrator.jobs.own import UserCodeError, last_line_of
from orchestrator.policies.tier import Tier, is_cheaper
from orchestrator.train.batch.guard import is_out_of_memory
from orchestrator.train.device_fault import is_device_fault

_NAMES_A_DTYPE = re.compile(r"bfloat16|float16|\bhalf\b|dtype|scalar ?type", re.IGNORECASE)
_NOT_OF_A_TIER = (FunctionError, UserCodeError)
"""Errors about what is reported and how the function is loaded."""


class TierBlame:
    """Follows the tiers of one attempt of a function that began in `start`."""

    def __init__(self, start: Tier) -> None:
        self._start = start
        self._tried: Tier | None = None
        self._proven: set[Tier] = set()
        self._last: Tier | None = None

    def turned(self, tier: Tier) -> None:
        """Steps are computed in `tier` from now on."""
        if is_cheaper(tier, self._start):
            self._last = tier
            if tier not in self._proven:
                self._tried = tier

    def reported(self, tier: Tier) -> None:
        """A report was made while steps were computed in `tier`."""
        self._proven.add(tier)
        self._tried = None

    def judge(self, error: Exception) -> None:
        """Raise what the function raised, or what its tier has to answer for.

        Raises:
            TierError: a cheaper tier may be why.
            Exception: the error itself.
        """
        blamed = self._of(error)
        if blamed:
            raise TierError(blamed) from error
        raise error

    def _of(self, error: Exception) -> str:
        """The cheaper tier and the error in one line, if the tier may be to blame; empty where it is not."""
        tier = self._tried
        if tier is None and _NAMES_A_DTYPE.search(str(error)):
            tier = self._last
        is_other = isinstance(error, _NOT_OF_A_TIER) or is_out_of_memory(error) or is_device_fault(error)
        return "" if tier is None or is_other else f"it raised in {tier}: {' '.join(last_line_of(error).split())}"
