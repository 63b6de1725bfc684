"""Results that a library makes by itself, as a Trainer its evaluations: reported unless the function reports its own.

An adapter offers them when they are there and settles the offer before the next step, so that a function's own callback
that reports the same evaluation to Ray comes first; from then on nothing that is offered is reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Offers:
    """What was offered since the last step.

    Args:
        metric: that of the search; an offer without it is no report.
        report: takes the values and the checkpoint that belongs to them, a folder or a file.
    """

    def __init__(self, metric: str, report: Callable[[Mapping[str, Any], Path | None], None]) -> None:
        self._metric, self._report = metric, report
        self._values: dict[str, Any] = {}
        self._checkpoint: Path | None = None
        self._is_standing_back = False
        self.other_names: set[str] = set()
        """Names of the values of offers without the metric."""

    @property
    def is_open(self) -> bool:
        """Whether something was offered and not settled yet."""
        return bool(self._values)

    def offer(self, values: Mapping[str, Any], checkpoint: Path | None = None) -> None:
        """Add results, those of several data sets for example, and the checkpoint that was written with them."""
        if self._is_standing_back:
            return
        self._values.update(values)
        self._checkpoint = checkpoint or self._checkpoint

    def settle(self) -> None:
        """Report what was offered, if the search's metric is in it. May not return, as any report."""
        values, checkpoint = self._values, self._checkpoint
        self._values, self._checkpoint = {}, None
        if not values:
            return
        if self._metric and self._metric not in values:
            if not self.other_names:
                logger.info("no report: %r is not among %s", self._metric, ", ".join(sorted(values)))
            self.other_names |= values.keys()
            return
        # A library that keeps few checkpoints may have removed this one already.
        self._report(values, checkpoint if checkpoint is not None and checkpoint.exists() else None)

    def stand_back(self) -> None:
        """The function reports by itself."""
        self._is_standing_back = True
        self._values, self._checkpoint = {}, None
