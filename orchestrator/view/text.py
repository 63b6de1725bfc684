"""Turning values into short, safe text for a terminal.

Names, parameters and error messages come from users and from training code, so nothing here lets a control character,
an escape sequence or an invisible direction mark through. Rich markup needs no care: whoever draws these strings draws
them as plain text. Used by everything in `view`.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence

from orchestrator.config.words import printable

ELLIPSIS = "..."
MISSING = "-"
_MAX_CHARACTERS = 4096


def clean(value: object) -> str:
    """One line of printable text: white space becomes one space, what does not print is spelled as an escape."""
    return printable(" ".join(str(value)[:_MAX_CHARACTERS].split()), _MAX_CHARACTERS)


def width_of(text: str) -> int:
    """Terminal cells of clean text: East Asian wide characters take two, combining marks none."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, width: int) -> str:
    """`text` in at most `width` cells; what is cut off is marked by an ellipsis where there is room for one."""
    if width_of(text) <= width:
        return text
    mark = ELLIPSIS if width > len(ELLIPSIS) + 2 else ""
    room = width - len(mark)
    kept = ""
    for character in text:
        room -= width_of(character)
        if room < 0:
            break
        kept += character
    return kept + mark


def clip_front(text: str, width: int) -> str:
    """As `clip`, but keeps the end, by which trials differ."""
    return text if width_of(text) <= width else clip(text[::-1], width)[::-1]


def pad(text: str, width: int, *, right: bool = False) -> str:
    """`text` in exactly `width` cells, to the left or to the right."""
    shown = clip(text, width)
    space = " " * (width - width_of(shown))
    return space + shown if right else shown + space


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """`text` over as many lines as it needs, nothing cut off; long words (paths) are broken."""
    lines = textwrap.wrap(text, max(width, len(indent) + 10), initial_indent=indent, subsequent_indent=indent)
    return lines or [indent.rstrip()]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str] = ()) -> list[str]:
    """Aligned lines of a small table, head first; columns named in `numeric` are aligned to the right."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max([width_of(name), *(width_of(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    return [
        "  ".join(
            pad(cell, width, right=name in numeric) for cell, width, name in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in [list(columns), *cells]
    ]


def number(value: object) -> float | None:
    """A finite number out of a status or journal field, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e308 and math.isfinite(value) else None


def whole(value: object) -> int | None:
    """A whole number out of a status or journal field, else None."""
    known = number(value)
    return None if known is None else int(known)


def show_number(value: object, digits: int = 4) -> str:
    """A number in about `digits` digits, a dash where there is none."""
    known = number(value)
    if known is None:
        return MISSING
    if known == 0 or 1e-3 <= abs(known) < 10**digits:
        places = max(0, digits - 1 - (0 if abs(known) < 1 else math.floor(math.log10(abs(known)))))
        return f"{known:.{places}f}"
    return f"{known:.{max(0, digits - 3)}e}"


def show_count(value: object) -> str:
    """A count: in full up to 99999, then as 123k, 45M, 6G."""
    known = whole(value)
    if known is None:
        return MISSING
    for limit, divisor, unit in ((100_000, 1, ""), (10**7, 10**3, "k"), (10**10, 10**6, "M"), (10**13, 10**9, "G")):
        if abs(known) < limit:
            return f"{known // divisor}{unit}"
    return f"{known:.0e}"


def show_gain(value: object) -> str:
    """A gain ratio as signed percent, a dash where it is unknown."""
    known = number(value)
    return MISSING if known is None else f"{100 * known:+.0f} %"


def show_seconds(value: object) -> str:
    """A duration as 1:23, 1:02:03 or 4d 05h, a dash where it is unknown."""
    known = whole(value)
    if known is None:
        return MISSING
    minutes, seconds = divmod(max(0, known), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def show_gib(value: object) -> str:
    """Bytes as GiB with one decimal, a dash where unknown."""
    known = number(value)
    return MISSING if known is None else f"{known / 2**30:.1f}"


def show_settings(settings: Mapping[str, object]) -> str:
    """The dials on one line: share, batch as micro-batch x accumulation, tier, workers where there are several."""
    batch = f"{show_count(settings.get('micro_batch'))}x{show_count(settings.get('grad_accum'))}"
    workers = whole(settings.get("num_workers")) or 1
    return " ".join(
        [
            f"share {show_number(settings.get('share'), 3)}",
            f"batch {batch}",
            clean(settings.get("tier") or MISSING),
            *([f"{workers} ranks"] if workers > 1 else []),
        ]
    )


def show_params(params: Mapping[str, object], width: int) -> str:
    """Parameters in at most `width` cells: the first ones, and the last one; what is between is left out.

    A trial's searched parameters come first, its fixed ones behind them.
    """
    parts = [f"{clean(name)}={_short(value)}" for name, value in params.items()]
    whole_text = " ".join(parts)
    if width_of(whole_text) <= width or not parts:
        return whole_text
    end = f" {ELLIPSIS} {parts[-1]}" if len(parts) > 2 else f" {ELLIPSIS}"
    for ending in (end, f" {ELLIPSIS}"):
        for kept in range(len(parts) - 1, 0, -1):
            text = " ".join(parts[:kept]) + ending
            if width_of(text) <= width:
                return text
    return clip_middle(parts[0], width)


def clip_middle(text: str, width: int) -> str:
    """As `clip`, but keeps the beginning and the end."""
    if width_of(text) <= width or width <= len(ELLIPSIS) + 2:
        return clip(text, width)
    room = width - len(ELLIPSIS)
    tail = clip(text[::-1], room // 2 + len(ELLIPSIS))[: -len(ELLIPSIS)][::-1]
    head = clip(text, room - width_of(tail) + len(ELLIPSIS))[: -len(ELLIPSIS)]
    return f"{head}{ELLIPSIS}{tail}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else clean(value)


def dicts(value: object) -> list[Mapping[str, object]]:
    """The mappings in a list of a status file; nothing where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def mapping(value: object) -> Mapping[str, object]:
    """A mapping of a status file; an empty one where it is none."""
    return value if isinstance(value, dict) else {}
