"""The link of a rank to the policy actor: two background threads, one that listens and one that tells.

The only file of the training side that calls the actor. Training never waits for it: when the actor is slow, dead or
being restarted, the threads keep trying and the last order stays in force.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.clock import Reading, offset_to
from orchestrator.control.orders import Events, Outcome, SlotHello, SlotOp, SlotOrder
from orchestrator.errors import JournalError, WorkerGroupError
from orchestrator.policies.plan import TrialId
from orchestrator.policy_handle import policy_at
from orchestrator.train.link import Outbox

logger = logging.getLogger(__name__)

_POLL_S = 20.0
_RETRY_S = 0.25
_LEAVE_TIMEOUT_S = 10.0
_CLOCK_TIMEOUT_S = 10.0
_FLUSH_S = 10.0
_BEAT_S = 1.0
"""A heartbeat goes alone so often where there is nothing else to send."""


def _nothing() -> None:
    """Nobody wants to hear of new orders."""


class RayLink:
    """Rank 0 listens for orders; every rank tells what happened to it."""

    def __init__(self, actor_name: str, namespace: str, slot_id: str, rank: int, send_period_s: float) -> None:
        self._name, self._namespace = actor_name, namespace
        self._slot_id, self._rank, self._send_period_s = slot_id, rank, send_period_s
        self._actor: Any = None
        self._epoch = -1
        self._changed = threading.Condition()
        self._order: SlotOrder | None = None
        self._attempt: tuple[TrialId, int] | None = None
        self._is_closed = threading.Event()
        self._sending = threading.Lock()
        self._beaten_s = 0.0
        self._threads: list[threading.Thread] = []
        self.version = 0
        self.on_news: Callable[[], None] = _nothing
        self.outbox = Outbox()

    def attach(self, hello: SlotHello) -> int:
        """Report the worker group for work (rank 0); returns its epoch."""
        return int(self._ask("attach", hello))

    def start(self, epoch: int) -> None:
        """Begin to listen (rank 0) and to tell."""
        self._epoch = epoch
        self._set_clock()
        targets = [self._tell] if self._rank else [self._listen, self._tell]
        self._threads = [threading.Thread(target=target, daemon=True, name=target.__name__) for target in targets]
        for thread in self._threads:
            thread.start()

    def fault(self, reason: str) -> None:
        """The GPU failed under this process, which ends now."""
        self._ask("fault", self._slot_id, self._epoch, reason)

    def begin(self, trial_id: TrialId, attempt: int) -> None:
        """From here on, what is told belongs to this attempt; leftovers of the last one are nobody's."""
        leftovers = self.outbox.take()
        if not leftovers.is_empty:
            logger.warning("dropped %d undelivered telemetry messages of %s", len(leftovers.records), self._attempt)
        self._attempt = (trial_id, attempt)
        if self.outbox.offset_s:  # clocks of two machines drift apart
            self._set_clock()

    def close(self) -> None:
        """Stop both threads; an unanswered call of theirs is abandoned."""
        self._is_closed.set()
        self.outbox.nudge()

    def order(self) -> SlotOrder:
        """The newest order."""
        assert self._order is not None, "read before the first order came"
        return self._order

    def wait(self, version: int, timeout_s: float) -> None:
        """Return when the version differs from `version`, or after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Deliver everything that waits; False when the actor did not take it in time."""
        deadline_s = time.monotonic() + timeout_s
        if not self._sending.acquire(timeout=timeout_s):
            return False
        try:
            return self._deliver(self.outbox.take(), deadline_s)
        finally:
            self._sending.release()

    def leave(self, outcome: Outcome) -> Outcome:
        """Meet the other ranks at the actor and agree on how the trial ended."""
        agreed = self._ask(
            "leave", self._slot_id, self._epoch, self._attempt, self._rank, outcome, timeout_s=_LEAVE_TIMEOUT_S * 2
        )
        if agreed is None:
            raise WorkerGroupError(
                f"not all ranks of {self._slot_id} left trial {self._attempt} within {_LEAVE_TIMEOUT_S:g} s;"
                " the worker group is restarted"
            )
        result: Outcome = agreed
        return result

    def finish(self, outcome: Outcome) -> None:
        """Tell the actor that all ranks have left the trial (rank 0)."""
        self._ask("finish", self._slot_id, self._epoch, self._attempt, outcome)

    def _set_clock(self) -> None:
        """Learn how this machine's clock differs from the actor's; what is not known stays as it was."""

        def ask() -> Reading:
            answer: Reading = self._ask("clock", timeout_s=_CLOCK_TIMEOUT_S)
            return answer

        try:
            self.outbox.offset_s = offset_to(ask)
        except WorkerGroupError as error:
            logger.warning("the clock of the policy actor could not be read: %s", error)

    def _handle(self) -> Any:
        if self._actor is None:
            self._actor = policy_at(self._name, self._namespace)
        return self._actor

    def _ask(self, method: str, *arguments: Any, timeout_s: float = 60.0) -> Any:
        """Call the actor until it answers.

        Raises:
            WorkerGroupError: no answer within the timeout.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(getattr(self._handle(), method).remote(*arguments), timeout=timeout_s)
            except (RayError, ValueError, TimeoutError) as error:
                self._actor = None
                if isinstance(error, JournalError):  # it is there, and its disk is full: wait for room
                    deadline_s = time.monotonic() + timeout_s
                if time.monotonic() > deadline_s or self._is_closed.is_set():
                    raise WorkerGroupError(
                        f"the policy actor did not answer {method} within {timeout_s:g} s: {error}"
                    ) from error
                time.sleep(_RETRY_S)

    def _listen(self) -> None:
        """Keep one call pending that returns when the slot's order changes."""
        incarnation, seq = "", 0
        while not self._is_closed.is_set():
            try:
                order = ray.get(self._handle().watch.remote(self._slot_id, self._epoch, incarnation, seq))
            except (RayError, ValueError) as error:
                logger.debug("the policy actor is away: %s", error)
                self._actor = None
                time.sleep(_RETRY_S)
                continue
            if order is None:  # this epoch is over: end as if told to close
                order = SlotOrder(incarnation="fenced", seq=0, op=SlotOp.CLOSE)
                self._is_closed.set()
            if (order.incarnation, order.seq) != (incarnation, seq):
                incarnation, seq = order.incarnation, order.seq
                with self._changed:
                    self._order = order
                    self.version += 1
                    self._changed.notify_all()
                self.on_news()

    def _tell(self) -> None:
        """Deliver what waits, at most once a period unless it is urgent."""
        while not self._is_closed.is_set():
            self.outbox.wait_filled(self._send_period_s)
            with self._sending:
                self._deliver(self.outbox.take(), deadline_s=None)

    def _is_beat_due(self, events: Events) -> bool:
        """Whether a heartbeat goes alone: nothing else was sent for a while."""
        return events.beat is not None and time.monotonic() >= self._beaten_s + _BEAT_S

    def _deliver(self, events: Events, deadline_s: float | None) -> bool:
        """Send one message until it is taken over (or refused as belonging to an attempt that is over)."""
        if self._attempt is None or (events.is_empty and not self._is_beat_due(events)):
            return True
        self._beaten_s = time.monotonic()
        while not self._is_closed.is_set():
            try:
                timeout_s = 10.0 if deadline_s is None else max(0.1, deadline_s - time.monotonic())
                call = self._handle().tell.remote(self._slot_id, self._epoch, self._attempt, self._rank, events)
                ray.get(call, timeout=timeout_s)
            except (RayError, ValueError) as error:
                logger.debug("the policy actor is away: %s", error)
                self._actor = None
                if deadline_s is not None and isinstance(error, JournalError):  # it is there, and waits for room
                    deadline_s = time.monotonic() + _FLUSH_S
                if deadline_s is not None and time.monotonic() > deadline_s:
                    return False
                time.sleep(_RETRY_S)
            else:
                return True
        return False
