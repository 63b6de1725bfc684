"""Ways in which the driver unwinds a user's function. None is an `Exception`: its own handlers let them pass."""

from __future__ import annotations


class Leave(BaseException):
    """Unwinds a function that was told to leave; not an Exception, so that its own handlers let it pass."""


class Done(BaseException):
    """Unwinds a function that made its last report."""


class Spoilt(BaseException):
    """Unwinds a function whose weights a cheaper tier has spoilt."""
