"""Words for people: how a value seen in a run file is shown, and which known word a typo probably meant.

Knows nothing of run files. Used by everything that reports a user's mistake; all output is one printable line.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable

_MAX_SEEN = 60


def printable(text: str, limit: int = 400) -> str:
    """`text` as one line without control characters, cut after `limit` characters; safe to send to a terminal."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def seen(value: object) -> str:
    """A value as its author would recognise it, with its type where that is likely the mistake."""
    match value:
        case None:
            words = "nothing (null)"
        case bool():
            words = f"{str(value).lower()} (a boolean)"
        case int():
            words = str(value) if abs(value) < 10**_MAX_SEEN else f"a number of more than {_MAX_SEEN} digits"
        case float():
            words = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan" if math.isnan(value) else repr(value))
        case str():
            words = f"'{printable(value, _MAX_SEEN)}' (text)"
        case list() | tuple():
            words = f"a list of {len(value)}"
        case dict():
            words = "a mapping"
        case _:
            words = f"a {type(value).__name__}"
    return words


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most probably was meant to be, None where none is close.

    One edit in a short word ('lrr' for 'lr') and swapped or wrong letters in a longer one both count as close.
    """
    words = list(known)
    lowered = {w.lower().replace("-", "_"): w for w in reversed(words)}
    asked = word.lower().replace("-", "_")[:100]
    if asked in lowered:
        return lowered[asked]
    ratio_needed = 0.6 if len(asked) > 3 else 0.5
    close = difflib.get_close_matches(asked, list(lowered), n=1, cutoff=ratio_needed)
    return lowered[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?', or nothing where no known word is close."""
    match = nearest(word, known)
    return f"; did you mean '{match}'?" if match else ""


_PLAIN_FRACTION = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def looks_like_number(text: str) -> bool:
    """Whether a text is a number that somebody put in quotes."""
    return _PLAIN_FRACTION.fullmatch(text) is not None
