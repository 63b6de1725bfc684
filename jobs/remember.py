"""Data that is loaded once per process, and what was said when it was: said again to every trial that gets it.

A process serves trials in turn, each with a log of its own; a file that was left out, or which text it was, belongs
into all of them. Knows no data; the loaders of the jobs are decorated with it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import ParamSpec, TypeVar

MAX_SAID = 50
"""Messages of one load that are repeated, at most; the last ones, which sum up."""

P = ParamSpec("P")
R = TypeVar("R")


class _Listener(logging.Handler):
    """Keeps what is logged while it listens."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((record.name, record.levelno, record.getMessage()))


def remembered(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Like `functools.lru_cache`, but a call that is answered from the cache logs what the first one did.

    What raises is not kept.
    """

    def decorate(load: Callable[P, R]) -> Callable[P, R]:
        kept: OrderedDict[Hashable, tuple[R, list[tuple[str, int, str]]]] = OrderedDict()

        @wraps(load)
        def answer(*args: P.args, **kwargs: P.kwargs) -> R:
            key = (args, tuple(sorted(kwargs.items())))
            if key in kept:
                kept.move_to_end(key)
                value, heard = kept[key]
                for name, level, message in heard[-MAX_SAID:]:
                    logging.getLogger(name).log(level, "%s", message)
                return value
            listener, logger = _Listener(), logging.getLogger("orchestrator.jobs")
            logger.addHandler(listener)
            try:
                value = load(*args, **kwargs)
            finally:
                logger.removeHandler(listener)
            kept[key] = value, listener.heard
            while len(kept) > maxsize:
                kept.popitem(last=False)
            return value

        return answer

    return decorate
