"""Writes a resolved configuration as YAML that reads back to the same values, with each value's origin as a comment.

Strings are quoted wherever YAML 1.1 or 1.2 could take them for something else. Called by `config.resolve`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from orchestrator.config.source import KeyPath, plain_scalar

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*", re.ASCII)
# What YAML 1.1 readers take for booleans; quoted so that every reader agrees.
_OLD_BOOLEANS = frozenset({"y", "n", "yes", "no", "on", "off"})
_ORIGIN_COLUMN = 40


def scalar(value: object) -> str:
    """One YAML value on one line: a scalar, or a flow list of them."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float():
            return _number(value)
        case list() | tuple():
            return f"[{', '.join(scalar(item) for item in value)}]"
    return _text(str(value))


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    mantissa, exponent, power = repr(value).partition("e")
    # YAML 1.1 wants a point in the mantissa, or it reads text.
    return (mantissa if "." in mantissa else f"{mantissa}.0") + exponent + power


def _text(value: str) -> str:
    is_word = isinstance(plain_scalar(value), str) and value.lower() not in _OLD_BOOLEANS
    if is_word and _BARE.fullmatch(value):
        return value
    return '"' + "".join(_escaped(c) for c in value) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable() and character.isascii():
        return character
    return f"\\U{ord(character):08x}"


def to_yaml(data: Mapping[str, object], origins: Mapping[str, str] | None = None) -> str:
    """Block YAML of nested mappings; with `origins`, each leaf ends with its origin."""
    return "".join(line + "\n" for line in _lines(data, (), origins or {}))


def _lines(data: Mapping[str, object], path: KeyPath, origins: Mapping[str, str]) -> Iterator[str]:
    for key, value in data.items():
        head = f"{'  ' * len(path)}{_text(str(key))}:"
        if isinstance(value, Mapping) and value:
            yield head
            yield from _lines(value, (*path, key), origins)
            continue
        line = f"{head} {'{}' if isinstance(value, Mapping) else scalar(value)}"
        origin = origins.get(".".join(str(p) for p in (*path, key)))
        yield line if origin is None else f"{line:<{_ORIGIN_COLUMN}}  # {origin}"
