"""What a run asks of the policy beside its dials: whose it is, how much it counts, what it was promised. Values only.

A run has terms from its run file; they may be changed while it runs, for all its trials or for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The terms of a run, or of one trial of it.

    Attributes:
        user: whose run it is.
        priority: trials of a higher priority are served first.
        weight: how much the goodput of a trial counts, > 0.
        deadline: when trials should have ended, in seconds since 1970; None without one.
        guaranteed_devices: devices below which a trial is never brought once it has them.
        protected: whether a trial is never paused, moved or resized once it runs.
        max_devices: the most devices that all trials of the user hold together; None without a quota.
    """

    user: str = ""
    priority: int = 0
    weight: float = 1.0
    deadline: float | None = None
    guaranteed_devices: float = 0.0
    protected: bool = False
    max_devices: float | None = None

    def changed(self, values: Mapping[str, Any]) -> Terms:
        """The same with other values, by name; names that are none of its own are passed over."""
        known = {each.name for each in fields(self)}
        return replace(self, **{name: value for name, value in values.items() if name in known})
