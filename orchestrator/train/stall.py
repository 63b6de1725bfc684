"""Whether a step of several ranks takes so much longer than those before that it will not end by itself.

Kernels of a collective spin until all ranks have theirs running. Where two trials of several ranks share the same GPUs,
each can come to wait for what the other holds, and then neither goes on: seen once on two H100 under MPS, with nothing
wrong in either trial. A rank that is stalled breaks its groups off; the trial goes on from its last commit, and the
other one at once. Begun and ended by the loop, asked by the watcher of `groups`.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable

FIRST_STEP_S = 600.0
"""A first step loads kernels and may compile."""
LEAST_S, MOST_S = 60.0, 90.0
"""Drawn in between by each process, so that of two trials that hold each other up only one has to leave."""
FACTOR = 30.0
"""Times the longest step so far: a large model's step may take a minute, and a slow one is not a stalled one."""


class Stall:
    """Times the steps of one rank.

    Args:
        least_s: seconds below which no step but the first is ever stalled; None to draw them.
        now_s: the clock.
    """

    def __init__(self, least_s: float | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._least_s = random.Random(os.getpid()).uniform(LEAST_S, MOST_S) if least_s is None else least_s
        self._now_s = now_s
        self._began_s: float | None = None
        self._longest_s = 0.0
        self._thread = 0

    def begin(self) -> None:
        """A step begins, with whatever is done to try it again."""
        self._thread = threading.get_ident()
        self._began_s = self._now_s()

    def end(self) -> None:
        """It ended, well or not."""
        if self._began_s is not None:
            self._longest_s = max(self._longest_s, self._now_s() - self._began_s)
        self._began_s = None

    @property
    def limit_s(self) -> float:
        """Seconds after which a step is stalled."""
        return FIRST_STEP_S if self._longest_s == 0.0 else max(self._least_s, FACTOR * self._longest_s)

    def is_over(self) -> bool:
        """Whether the present step is stalled."""
        began_s = self._began_s  # another thread may end it between two looks
        return began_s is not None and self._now_s() - began_s > self.limit_s

    def where(self) -> str:
        """The stack of the thread whose step it is; that cannot tell by itself."""
        frame = sys._current_frames().get(self._thread)
        return "" if frame is None else "".join(traceback.format_stack(frame))
