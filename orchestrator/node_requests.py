"""Asks the cluster's autoscaler for the nodes that the policy wishes for: the only one in a run that does.

The autoscaler remembers one request, the last one of anybody, until the next. Ray Train has its own speaker there,
which repeats every 20 s, and whenever a worker group starts or ends, what the worker groups of the cluster hold. Both
get along because a request here is always for whole nodes, all that are wished for, on which slots lie, and slots open
only where there is room: what Train repeats is never more than what is asked for here. It can only make the autoscaler
forget nodes that were not launched yet, so the request is repeated every few seconds, four times as often as Train's.

Lives in the driver, which is started again by hand; the wish itself is in the journal. Public Ray API only, by `Ask`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

REPEAT_S = 5.0
"""Train repeats its own every 20 s; the autoscaler looks every 5 s, and gives up no node within a minute."""
_GAP_S = 2.0
_LONGEST_BACK_OFF_S = 30.0
_RELEASE_TRIES = 3

Bundles = list[dict[str, float]]
Ask = Callable[[Bundles], None]


def ask_ray(bundles: Bundles) -> None:
    """Tell the autoscaler of the cluster that this process is connected to."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


class NodeRequests:
    """The requests of one run. Its methods may be called by several threads.

    Args:
        resources: what one node of each type has.
        ask: the call itself, for tests.
        now_s: monotonic time, for tests.
    """

    def __init__(
        self,
        resources: Mapping[str, Mapping[str, float]],
        *,
        ask: Ask = ask_ray,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resources, self._ask, self._now_s = resources, ask, now_s
        self._lock = threading.Lock()
        self._last: dict[str, int] | None = None
        self._asked_s = float("-inf")
        self._retry_s = float("-inf")
        self._back_off_s = 0.0
        self._is_released = False

    def want(self, wanted: Mapping[str, int]) -> None:
        """Ask for so many nodes of each type; called about once a second, and says so only when there is need.

        Nothing is asked for before the first wish.
        """
        with self._lock:
            now_s = self._now_s()
            if self._is_released or not wanted or now_s < self._retry_s:
                return
            is_news = dict(wanted) != self._last
            if now_s - self._asked_s < (_GAP_S if is_news else REPEAT_S):
                return
            if self._say(bundles_of(self.resources, wanted)) and is_news:
                words = ", ".join(f"{count} {name}" for name, count in sorted(wanted.items()))
                logger.info("nodes.requested %s", words)
                self._last = dict(wanted)

    def release(self) -> None:
        """Ask for nothing any more, for good; harmless when called again, or when nothing was ever asked for."""
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
            if self._last is None:
                return
            for _ in range(_RELEASE_TRIES):
                if self._say([]):
                    return
            logger.warning("nodes.kept the autoscaler could not be told that this run needs no nodes any more")

    def _say(self, bundles: Bundles) -> bool:
        """One call; whether it was taken. One that was not is repeated later, and later each time."""
        try:
            self._ask(bundles)
        except Exception as error:  # the cluster's store may be away for a while; whatever it raises, the run goes on
            self._back_off_s = min(_LONGEST_BACK_OFF_S, 2 * self._back_off_s or 1.0)
            self._retry_s = self._now_s() + self._back_off_s
            logger.warning("the autoscaler was not reached, again in %g s: %s", self._back_off_s, error)
            return False
        self._back_off_s, self._asked_s = 0.0, self._now_s()
        return True


def bundles_of(resources: Mapping[str, Mapping[str, float]], wanted: Mapping[str, int]) -> Bundles:
    """One bundle per node: all that it has, so that no two fit on one node."""
    return [dict(resources[name]) for name, count in sorted(wanted.items()) for _ in range(count)]
