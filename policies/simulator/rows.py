"""Reading a CSV that somebody made: typed cells, and errors that name file, line, column, value and what is allowed.

Takes lines and not files, so that whoever has them may have read, received or written them. Knows no column by name.
Called by everything of the simulator that reads a table.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_MAX_SHOWN = 60
MAX_SECONDS = 1e11
"""About 3,000 years: time stamps of this century are below it in seconds, and above it in milliseconds and less."""


class TableError(ValueError):
    """A table that cannot be used. Its text says where and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    source: str
    line: int
    cells: dict[str, str]

    def text(self, column: str) -> str:
        """A cell that must not be empty."""
        value = self.cells.get(column, "").strip()
        if not value:
            raise self.wrong(column, "a text")
        return value

    def optional(self, column: str) -> str | None:
        """A cell, or None where it is empty or the table lacks the column."""
        return self.cells.get(column, "").strip() or None

    def integer(self, column: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.text(column)
        try:
            number = int(value)
        except ValueError:
            raise self.wrong(column, f"a whole number >= {least}") from None
        if not least <= number < 2**40:
            raise self.wrong(column, f"a whole number >= {least}")
        return number

    def number(self, column: str, *, least: float = 0.0, above: float | None = None, most: float = math.inf) -> float:
        """A finite number in [least, most], or greater than `above`."""
        value = self.text(column)
        allowed = f"a number {f'> {above:g}' if above is not None else f'>= {least:g}'}"
        allowed += "" if most == math.inf else f" and <= {most:g}"
        try:
            number = float(value)
        except ValueError:
            raise self.wrong(column, allowed) from None
        low_ok = number > above if above is not None else number >= least
        if not (math.isfinite(number) and low_ok and number <= most):
            raise self.wrong(column, allowed)
        return number

    def seconds(self, column: str) -> float:
        """A time in seconds since some beginning; a time stamp in smaller units is refused, not taken for seconds."""
        number = self.number(column)
        if number > MAX_SECONDS:
            raise self.wrong(column, f"seconds, at most {MAX_SECONDS:g}; divide a time stamp in smaller units")
        return number

    def one_of(self, column: str, known: Iterable[str]) -> str:
        """One of the known words."""
        value = self.text(column)
        words = sorted(known)
        if value not in words:
            close = difflib.get_close_matches(value, words, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise self.wrong(column, f"{', '.join(words)}{hint}")
        return value

    def wrong(self, column: str, allowed: str) -> TableError:
        """The error about one cell."""
        value = self.cells.get(column, "").strip()
        shown = ascii(value if len(value) <= _MAX_SHOWN else f"{value[: _MAX_SHOWN - 3]}...")
        return TableError(f"{self.source}:{self.line}: {column}={shown}; allowed: {allowed}")


def read_rows(
    lines: Iterable[str], source: str, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Row]:
    """Rows of a CSV with a head line; empty lines and comments, which begin with '#', are passed over.

    Raises:
        TableError: a column is missing, unknown or named twice, a line has another number of cells than the head, or a
            line below it begins with '#' and could be a comment as well as a row.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    number, head = next(((number, line) for number, line in numbered if line[0] != "#"), (1, ""))
    columns = [cell.strip() for cell in _cells(head, source, number)]
    _check_head(columns, f"{source}:{number}", required, optional)
    for number, line in numbered:
        cells = _cells(line, source, number)
        if line[0] == "#":
            if len(cells) == len(columns):
                raise TableError(
                    f"{source}:{number}: begins with '#' and has as many cells as the head; allowed: a name in quotes"
                    f' ("{cells[0][:_MAX_SHOWN]}"), or a comment without commas'
                )
            continue
        if len(cells) != len(columns):
            raise TableError(
                f"{source}:{number}: {len(cells)} cells; allowed: {len(columns)}, one for each of {', '.join(columns)}"
            )
        yield Row(source, number, dict(zip(columns, cells, strict=True)))


def _cells(line: str, source: str, number: int) -> list[str]:
    try:
        return next(csv.reader([line.lstrip("\ufeff")], strict=True), [])
    except csv.Error as error:
        raise TableError(f"{source}:{number}: not a line of a CSV table ({error})") from None


def _check_head(columns: Sequence[str], where: str, required: Sequence[str], optional: Sequence[str]) -> None:
    known = [*required, *optional]
    missing = [column for column in required if column not in columns]
    if missing:
        raise TableError(
            f"{where}: column {missing[0]!r} is missing; the first line must name {', '.join(required)}"
            + (f" and may name {', '.join(optional)}" if optional else "")
        )
    if not columns[0] and columns[1:] and set(columns[1:]) <= set(known):
        raise TableError(
            f"{where}: the first column has no name, as pandas writes its index; write the table with index=False, or"
            " remove that column"
        )
    for column in columns:
        if column not in known:
            close = difflib.get_close_matches(column, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TableError(f"{where}: unknown column {column[:_MAX_SHOWN]!a}; allowed: {', '.join(known)}{hint}")
        if columns.count(column) > 1:
            raise TableError(f"{where}: column {column!r} is named {columns.count(column)} times; allowed: once")
