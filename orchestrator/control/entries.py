"""Events as the JSON objects of journal lines, and back. The classes say what there is; this says how it is written.

Called by `journal`. Decoding is strict about types, so that a damaged value is found where it is read, and passes over
keys that a class does not have.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NewType, get_args, get_origin, get_type_hints

from orchestrator.control import events as ev
from orchestrator.control import fault_events as fev
from orchestrator.control.events import IN_JOURNAL, LEFT_OUT, RAW, SCHEMA_VERSION, SPARSE, Event, Recovered, RunBegan
from orchestrator.control.requested import RequestTaken
from orchestrator.errors import JournalError
from orchestrator.policies.codec import settings_from, to_jsonable
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier

EVENTS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        ev.RunBegan,
        ev.Recovered,
        ev.SlotChanged,
        ev.NodeChanged,
        ev.TrialQueued,
        ev.TrialAssigned,
        ev.TrialToldToStop,
        ev.TrialRequeued,
        ev.TrialResized,
        ev.TrialPaused,
        ev.ResumptionWanted,
        ev.TrialContinued,
        ev.TrialEnded,
        ev.PlanCommitted,
        ev.PlanRefused,
        ev.Offered,
        ev.Acknowledged,
        ev.DialsDeclared,
        ev.Overridden,
        ev.Reported,
        ev.CommitPinned,
        ev.TrialSuspected,
        ev.SlotPoisoned,
        ev.RunInterrupted,
        ev.ReportTold,
        ev.ShareChecked,
        ev.GainRealised,
        ev.RunEnded,
        RequestTaken,
        fev.CommitDamaged,
        fev.TrialRetried,
        fev.RankSilent,
    )
}
"""The class of each kind of entry."""


def encode(event: Event) -> dict[str, Any]:
    """The entry as a JSON object.

    Raises:
        JournalError: it holds a value that JSON has no word for.
    """
    try:
        entry: dict[str, Any] = {"kind": event.kind}
        cls: Any = type(event)
        for name, how, default in _written(cls):
            value = getattr(event, name)
            if how != SPARSE or value != default:
                entry[name] = value if how == RAW else to_jsonable(value)
    except ValueError as error:
        raise JournalError(f"journal entry {event.kind!r} is not plain JSON: {error}") from error
    return entry


def decode(entry: Mapping[str, Any], run_id: str = "") -> Event:
    """The event of a run that a journal's JSON object holds. Keys that the class does not have are passed over.

    Raises:
        KeyError, TypeError, ValueError: its kind is not known, a field is missing or of another type.
        JournalError: it is the head of a journal of a newer version.
    """
    cls: Any = EVENTS.get(entry["kind"])
    if cls is None:
        raise ValueError(f"kind {str(entry['kind'])[:40]!r} is not one of {', '.join(EVENTS)}")
    if cls in {RunBegan, Recovered} and int(entry.get("schema", 1)) > SCHEMA_VERSION:
        raise JournalError(
            f"the journal has schema {entry['schema']}, written by a newer version of the orchestrator; this one reads"
            f" up to {SCHEMA_VERSION}: use that version"
        )
    values = {name: entry[name] for name in ("seq", "t_s", "wall_s")} | {"run_id": run_id}
    for name, read, is_required in _readers(cls):
        if is_required or name in entry:
            values[name] = read(entry[name])
    event: Event = cls(**values)
    return event


Read = Callable[[Any], Any]


@cache
def _written(cls: Any) -> tuple[tuple[str, object, object], ...]:  # noqa: ANN401 - a dataclass
    """Name of each field of an event that is written, how, and its default."""
    found = ((each.name, each.metadata.get(IN_JOURNAL), each.default) for each in dataclasses.fields(cls))
    return tuple(field for field in found if field[1] != LEFT_OUT)


@cache
def _readers(cls: Any) -> tuple[tuple[str, Read, bool], ...]:  # noqa: ANN401 - a dataclass
    """Name, reader and whether it must be there, of each field of an event."""
    hints = get_type_hints(cls)
    return tuple(
        (
            each.name,
            _reader(hints[each.name]),
            each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING,
        )
        for each in dataclasses.fields(cls)
        if each.metadata.get(IN_JOURNAL) != LEFT_OUT
    )


def _reader(hint: Any) -> Read:  # noqa: ANN401 - a type, as `typing` has them
    """The function that turns a JSON value into one of the declared type, or raises TypeError or ValueError."""
    if isinstance(hint, NewType):
        return _reader(hint.__supertype__)
    if get_origin(hint) is not None:
        return _reader_of_parts(get_origin(hint), get_args(hint))
    if hint in _READERS:
        return _READERS[hint]
    return partial(_read_dataclass, hint) if dataclasses.is_dataclass(hint) else partial(_read_enum, hint)


def _reader_of_parts(origin: Any, parts: tuple[Any, ...]) -> Read:  # noqa: ANN401
    """The same for a mapping, a tuple of one type, or a value that may be None."""
    if origin is Mapping:
        item = _reader(parts[1])
        return lambda value: {str(key): item(each) for key, each in _is_a(value, Mapping).items()}
    item = _reader(next(part for part in parts if part is not types.NoneType))
    if origin is tuple:
        return lambda value: tuple(item(each) for each in _is_a(value, list | tuple))
    return lambda value: None if value is None else item(value)


def _read_dataclass(cls: Any, value: Any) -> Any:  # noqa: ANN401 - any dataclass
    readers = _readers_of(cls)
    return cls(**{name: readers[name](each) for name, each in _is_a(value, Mapping).items() if name in readers})


@cache
def _readers_of(cls: Any) -> dict[str, Read]:  # noqa: ANN401 - any dataclass
    return {name: _reader(hint) for name, hint in get_type_hints(cls).items()}


def _read_enum(cls: Any, value: Any) -> Any:  # noqa: ANN401 - any enumeration
    return cls(value)


def _is_a(value: Any, kind: Any) -> Any:  # noqa: ANN401 - a JSON value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{str(value)[:60]!r} is a {type(value).__name__}")
    return value


_READERS: dict[Any, Read] = {
    Any: lambda value: value,
    Settings: settings_from,
    Tier: lambda value: Tier(_is_a(value, str)),
    int: lambda value: int(_is_a(value, int)),
    float: lambda value: float(_is_a(value, int | float)),
    bool: lambda value: bool(_is_a(value, bool)),
    str: lambda value: str(_is_a(value, str)),
}
