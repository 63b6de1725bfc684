"""The share dial of every training: hands the granted device units of this rank to the share mechanism."""

from __future__ import annotations

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.train.dials.dial import held_still


class ShareDial:
    """Cores, SM groups or turns of this rank's device, as the mechanism of the slot enforces them.

    `why_off` is set while the training runs: one that computes on CUDA streams of its own leaves the granted part.
    """

    name = "share"

    def __init__(self, mechanism: ShareMechanism, rank: int, start: Settings) -> None:
        self._mechanism, self._rank, self._start = mechanism, rank, start
        self.why_off = ""

    def limits(self, asked: DialLimits) -> DialLimits:
        """All that the run file allows, unless it is off."""
        return held_still(self.name, asked, self._start) if self.why_off else asked

    def prepare(self, asked: Settings) -> Settings:
        """As asked: the ledger never grants more than there is."""
        return asked

    def apply(self, grant: Grant, settings: Settings) -> None:
        """Compute on the granted units from now on. A share of 0 is a pause at the boundary, no mechanism knows it."""
        if settings.share > 0:
            self._mechanism.apply(grant.units[self._rank], grant.amount)
