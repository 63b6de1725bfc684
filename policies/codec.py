"""Canonical JSON of the values of this package: what the journal stores and a replay reads back.

Encoding follows the declared types of the dataclasses, so that equal values give equal bytes: keys sorted, no spaces,
ASCII, floats in their shortest exact form, an integer in a float field written as a float, NaN and infinity refused.
Decoding is strict: an unknown or missing key and a wrong type are errors that name the path. It knows no file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

from orchestrator.policies.learn.fit import Observation, TrialFit
from orchestrator.policies.plan import Allocation, Plan, Settings
from orchestrator.policies.snapshot import DeviceView, DialLimits, Override, Snapshot, TrialView
from orchestrator.policies.tier import TIER_WORDS, Tier

_T = TypeVar("_T")
_Reader = Callable[[object, str], object]


def to_jsonable(value: object) -> Any:  # noqa: ANN401 -- JSON has no narrower type that callers could index
    """The value as dicts, lists, strings and numbers; a dataclass or mapping becomes a dict.

    Raises:
        ValueError: it holds NaN, an infinity or something that JSON has no word for; the message names the path.
    """
    return _encode(value, type(value).__name__, as_float=False)


def dumps(value: object) -> str:
    """The value as canonical JSON text on one line. Raises ValueError as `to_jsonable` does."""
    return json.dumps(to_jsonable(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def snapshot_from(obj: object) -> Snapshot:
    """The snapshot whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(Snapshot, obj)


def trial_from(obj: object) -> TrialView:
    """The trial view whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(TrialView, obj)


def device_from(obj: object) -> DeviceView:
    """The device view whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(DeviceView, obj)


def limits_from(obj: object) -> DialLimits:
    """The dial limits whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(DialLimits, obj)


def plan_from(obj: object) -> Plan:
    """The plan whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(Plan, obj)


def allocation_from(obj: object) -> Allocation:
    """The allocation whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(Allocation, obj)


def settings_from(obj: object) -> Settings:
    """The settings whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(Settings, obj)


def override_from(obj: object) -> Override:
    """The override whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(Override, obj)


def observation_from(obj: object) -> Observation:
    """The observation whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(Observation, obj)


def fit_from(obj: object) -> TrialFit:
    """The fit whose `to_jsonable` is `obj`. Raises ValueError with the path of what is wrong."""
    return _decode(TrialFit, obj)


def _encode(value: object, path: str, *, as_float: bool) -> object:
    """Encode recursively; `as_float` writes integers as floats, as the declared type wants them."""
    if isinstance(value, tuple | list):
        return [_encode(item, f"{path}[{index}]", as_float=as_float) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, path): _encode(item, f"{path}.{key}", as_float=False) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name: _encode(getattr(value, name), f"{path}.{name}", as_float=wants_float)
            for name, wants_float, unless in _fields_of(type(value))
            if unless is dataclasses.MISSING or getattr(value, name) != unless
        }
    if isinstance(value, Enum):
        return _encode_scalar(value.value, path, as_float=False)
    return _encode_scalar(value, path, as_float=as_float)


def _encode_scalar(value: object, path: str, *, as_float: bool) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and not as_float:
        return int(value)
    if not isinstance(value, int | float):
        raise ValueError(
            f"{path} is a {type(value).__name__}, which cannot be written as JSON; allowed: dataclasses, enums, "
            "mappings, lists, tuples, str, finite numbers, bool, None"
        )
    return _read_float(value, path)


def _key(key: object, path: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{path} has the key {key!r}; allowed: strings")
    return str(key)


@cache
def _fields_of(cls: type) -> tuple[tuple[str, bool, object], ...]:
    """Names of a dataclass's fields, whether each is declared to hold floats, and the value at which it is left out."""
    hints = get_type_hints(cls)
    return tuple(
        (
            field.name,
            _holds_floats(hints[field.name]),
            field.default if field.metadata.get("sparse") else dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
    )


def _holds_floats(hint: object) -> bool:
    parts = get_args(hint)
    return hint is float or (float in parts and int not in parts)


def _decode(cls: type[_T], obj: object) -> _T:
    hint: object = cls
    value = _reader_of(hint)(obj, cls.__name__.lower())
    assert isinstance(value, cls)
    return value


@cache
def _reader_of(hint: object, /) -> _Reader:
    """The function that reads a value of the declared type, or fails with its path."""
    if isinstance(hint, NewType):
        return _reader_of(hint.__supertype__)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_reader(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return _optional_reader(_reader_of(next(part for part in get_args(hint) if part is not type(None))))
    if get_origin(hint) is tuple:
        return _tuple_reader(_reader_of(get_args(hint)[0]))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_reader(hint)
    return _SCALARS[hint]


def _read_tier(obj: object, path: str) -> Tier:
    try:
        return Tier(_read_str(obj, path))
    except ValueError:
        raise _wrong(path, obj, TIER_WORDS) from None


def _dataclass_reader(cls: type) -> _Reader:
    hints = get_type_hints(cls)
    readers = {field.name: _reader_of(hints[field.name]) for field in dataclasses.fields(cls)}
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def read(obj: object, path: str) -> object:
        if not isinstance(obj, Mapping):
            raise _wrong(path, obj, f"an object with the keys {', '.join(readers)}")
        for key in obj:
            if key not in readers:
                raise ValueError(f"{path} has the unknown key {key!r}; allowed: {', '.join(readers)}")
        missing = sorted(required - obj.keys())
        if missing:
            raise ValueError(f"{path} lacks the key {missing[0]!r}; required: {', '.join(sorted(required))}")
        return cls(**{name: readers[name](item, f"{path}.{name}") for name, item in obj.items()})

    return read


def _optional_reader(inner: _Reader) -> _Reader:
    return lambda obj, path: None if obj is None else inner(obj, path)


def _tuple_reader(inner: _Reader) -> _Reader:
    def read(obj: object, path: str) -> object:
        if not isinstance(obj, list | tuple):
            raise _wrong(path, obj, "a list")
        return tuple(inner(item, f"{path}[{index}]") for index, item in enumerate(obj))

    return read


def _enum_reader(cls: type[Enum]) -> _Reader:
    by_value = {member.value: member for member in cls}

    def read(obj: object, path: str) -> object:
        if not isinstance(obj, str) or obj not in by_value:
            raise _wrong(path, obj, f"one of {', '.join(map(repr, by_value))}")
        return by_value[obj]

    return read


def _read_float(obj: object, path: str) -> float:
    if isinstance(obj, bool) or not isinstance(obj, int | float) or not -math.inf < obj < math.inf:
        raise _wrong(path, obj, "a finite number")
    try:
        return float(obj)
    except OverflowError:
        raise _wrong(path, obj, "a finite number") from None


def _read_int(obj: object, path: str) -> int:
    if isinstance(obj, bool) or not isinstance(obj, int):
        raise _wrong(path, obj, "an integer")
    return obj


def _read_bool(obj: object, path: str) -> bool:
    if not isinstance(obj, bool):
        raise _wrong(path, obj, "true or false")
    return obj


def _read_str(obj: object, path: str) -> str:
    if not isinstance(obj, str):
        raise _wrong(path, obj, "a string")
    return obj


_SCALARS: dict[object, _Reader] = {
    float: _read_float,
    int: _read_int,
    bool: _read_bool,
    str: _read_str,
    Tier: _read_tier,
}


def _wrong(path: str, seen: object, allowed: str) -> ValueError:
    text = repr(seen) if not isinstance(seen, int) or abs(seen) < 2**64 else "an integer beyond 64 bits"
    return ValueError(f"{path}={text[:80]} is not usable; allowed: {allowed}")
