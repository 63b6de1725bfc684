"""Signals that end a run: how many came, what was asked for, and a last resort where a run does not end by itself.

INT and TERM ask for the end: trials write checkpoints, a second one ends the run at once. HUP asks for nothing: the run
goes on without its terminal. Knows no Ray. Used by the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from orchestrator.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from orchestrator.output import hang_up

logger = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
ENDING_S = 12.0
"""Seconds that a run has to end once it was asked to and no trial writes a checkpoint any more."""
_SAME_S = 0.5
"""Signals within so long are one: `timeout` sends one to its child and one to the child's group."""
_LOOK_S = 0.2


class Interrupts:
    """The signals that this process was sent, taken by handlers in the main thread.

    Attributes:
        number: times that the end was asked for, 0 to 2.
        exit_code: that of the first signal; 130 for a run that another process asked to stop.
        since_s: when it was asked first, and when it was asked again; monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self.number, self.exit_code = 0, EXIT_CODES[signal.SIGINT]
        self.since_s: list[float] = []

    def note(self, number: int, _frame: object = None) -> None:
        """A signal came."""
        # Ray's core installs a handler of its own that prints a stack, calls this one and aborts the process seconds
        # later; see `reinstall`.
        signal.alarm(0)
        now_s = self._now_s()
        if not self.since_s:
            self.exit_code = EXIT_CODES[signal.Signals(number)]
        elif now_s - self.since_s[-1] < _SAME_S or self.number > 1:
            return
        self.number += 1
        self.since_s.append(now_s)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take signals; the handlers there were are put back afterwards."""
        before = {number: signal.signal(number, self.note) for number in EXIT_CODES}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` has seen to it
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda _number, _frame: hang_up())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def reinstall() -> None:
    """Put the handlers of this process in force again once Ray has started: its core puts others before them."""
    if threading.current_thread() is threading.main_thread():
        for number in EXIT_CODES:
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def terminable(end: Callable[[], BaseException]) -> Iterator[None]:
    """Let SIGTERM raise in the main thread, so that what is open is closed; nothing where somebody takes it already.

    Args:
        end: makes what is raised.
    """

    def leave(_number: int, _frame: object) -> None:
        raise end()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class LastResort:
    """Ends the process where a run that was asked to end does not.

    Args:
        interrupts: who asked.
        act: ends everything and returns the exit code; runs in a thread of its own, and the process ends after it.
        leave: ends the process; tests bring their own.
    """

    def __init__(
        self, interrupts: Interrupts, act: Callable[[], int], leave: Callable[[int], object] = os._exit
    ) -> None:
        self._interrupts, self._act, self._leave = interrupts, act, leave
        self._phase = (0.0, ENDING_S)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="last-resort", daemon=True)

    def __enter__(self) -> LastResort:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The run has ended by itself."""
        self._is_over.set()

    def allow(self, seconds: float) -> None:
        """From now on the run may take so long to end, once it was asked to."""
        self._phase = (time.monotonic(), seconds)

    @property
    def deadline_s(self) -> float:
        """When it acts, monotonic; infinite while nobody asked for the end."""
        asked = self._interrupts.since_s
        if not asked:
            return float("inf")
        since_s, allowed_s = self._phase
        deadline_s = max(since_s, asked[0]) + allowed_s
        return deadline_s if len(asked) == 1 else min(deadline_s, max(asked[1], since_s) + ENDING_S)

    def _watch(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            if time.monotonic() > self.deadline_s:
                code = self._interrupts.exit_code
                try:
                    code = self._act()
                except Exception:
                    logger.exception("the run could not be ended in order")
                finally:
                    self._leave(code)
                return
