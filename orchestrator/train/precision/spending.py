"""What a trial may spend on probes and calibration, and when: part of its time, and earlier where that surely pays.

Numbers in, steps out; the same on every rank if the numbers are. The time counts from the start with `_HEAD_START_S` in
advance, because a cheaper tier found early pays for longest. A short trial has next to nothing that way; so what may
lead to a faster tier is allowed to cost part of what that tier would save, and at most some seconds. Asked by `watch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_HEAD_START_S = 20.0
_PART_OF_SAVING, _MOST_ADVANCE_S = 0.25, 5.0


@dataclass(slots=True, kw_only=True)
class Spending:
    """The account of one attempt of a trial.

    Attributes:
        budget: part of the trial's time, above 0 where anything is asked.
        spent_s: seconds spent so far.
        step_s: what a step takes now.
    """

    budget: float
    spent_s: float = 0.0
    step_s: float = 1.0

    def steps_until(self, cost_s: float, num_steps: int, total_steps: float, saving: float = 0.0) -> int:
        """How many steps to wait until `cost_s` may be spent, 0 for none.

        Args:
            cost_s: what it will take.
            num_steps: steps done.
            total_steps: those of the whole trial at its present batch.
            saving: part of the time still to come that may be saved if this goes well.
        """
        step_s, needed_s = max(self.step_s, 1e-6), self.spent_s + cost_s
        if needed_s <= self._advance_s(num_steps, total_steps, saving):
            return 0
        head_start = min(total_steps / 2, _HEAD_START_S / step_s)
        return max(0, math.ceil(needed_s / (self.budget * step_s) - head_start) - num_steps)

    def is_within(self, cost_s: float, num_steps: int, total_steps: float, saving: float = 0.0) -> bool:
        """Whether with `cost_s` no more is spent than the budget of the whole trial or what `saving` allows."""
        allowed_s = max(self.budget * total_steps * self.step_s, self._advance_s(num_steps, total_steps, saving))
        return self.spent_s + cost_s <= allowed_s

    def _advance_s(self, num_steps: int, total_steps: float, saving: float) -> float:
        return min(_PART_OF_SAVING * saving * max(0.0, total_steps - num_steps) * self.step_s, _MOST_ADVANCE_S)
