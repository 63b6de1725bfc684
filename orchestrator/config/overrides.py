"""Lays `--set path=value` over what a run file says.

Knows no sections or fields: a wrong path is found when the result is validated, like a wrong key of the file. Called by
`config.resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.source import KeyPath, parse
from orchestrator.config.words import printable, seen
from orchestrator.errors import ConfigError

_FORM = "allowed: path=value, such as search.num_trials=12"
_MAX_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True)
class Override:
    """One parsed `--set`."""

    path: KeyPath
    value: object


def parse_override(text: str) -> Override:
    """Split 'a.b=value' and read the value as YAML.

    Raises:
        ConfigError: there is no '=', a part of the path is empty, or the value is no YAML.
    """
    shown = printable(text, 80)
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"got '{shown}'; {_FORM}", "--set")
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"'{shown}' has {len(text)} characters; allowed: {_MAX_CHARACTERS}", "--set")
    if not value.strip():
        raise ConfigError(f"'{shown}' has no value; {_FORM} ('null' for nothing)", "--set")
    try:
        document = parse(value, "--set")
    except ConfigError as error:
        raise ConfigError(error.text, "--set", None, printable(path, 80)) from None
    if document.problems:
        raise ConfigError(document.problems[0].text, "--set", None, printable(path, 80))
    return Override(tuple(keys), document.data)


def apply_overrides(data: object, overrides: Sequence[Override]) -> object:
    """A copy of `data` with every override written into it, later ones over earlier ones.

    Raises:
        ConfigError: an override goes through something that is no mapping.
    """
    for override in overrides:
        data = _with(data, override.path, override)
    return data


def _with(data: object, path: KeyPath, override: Override) -> object:
    if not path:
        return override.value
    if data is not None and not isinstance(data, Mapping):
        inside = ".".join(str(p) for p in override.path[: len(override.path) - len(path)]) or "the run file"
        text = (
            f"'{'.'.join(str(p) for p in override.path)}' goes through {inside}, which is {seen(data)}, not a mapping"
        )
        raise ConfigError(printable(text), "--set")
    head, rest = path[0], path[1:]
    below = dict(data or {})
    below[head] = _with(below.get(head), rest, override)
    return below
