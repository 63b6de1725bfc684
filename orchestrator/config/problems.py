"""Turns pydantic's errors into one line each: file:line, key, value seen, what is allowed, the key probably meant.

Knows the models only through their fields, so that a new field gets good messages by itself.
Called by `config.resolve`.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.config.foreign import ELSEWHERE
from orchestrator.config.source import Document, KeyPath, dotted
from orchestrator.config.words import did_you_mean, looks_like_number, nearest, printable, seen
from orchestrator.errors import ConfigError
from orchestrator.names import NAME_PATTERN, NAME_WORDS

MAX_SHOWN = 20

_TYPE_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Who is to blame: a path that `--set` wrote, or a line of the file."""

    document: Document
    file: str
    set_paths: tuple[KeyPath, ...] = ()

    def is_set(self, path: KeyPath) -> bool:
        """Whether `--set` wrote the value at the path, or something around it."""
        return any(path[: len(written)] == written for written in self.set_paths)

    def error(self, path: KeyPath, text: str) -> ConfigError:
        """A problem of the value at `path`."""
        key = dotted(path) or None
        if self.is_set(path):
            return ConfigError(text, "--set", None, key)
        return ConfigError(text, self.file, self.document.line_of(path), key)


def join(problems: Sequence[ConfigError]) -> ConfigError:
    """One error whose message has one line per problem; its place is that of the first."""
    first, rest = problems[0], problems[1:MAX_SHOWN]
    lines = [first.text, *(str(problem) for problem in rest)]
    if len(problems) > MAX_SHOWN:
        lines.append(f"... and {len(problems) - MAX_SHOWN} more")
    return ConfigError("\n".join(lines), first.file, first.line, first.key)


def from_pydantic(error: ValidationError, model: type[BaseModel], place: Place) -> list[ConfigError]:
    """The problems behind a failed validation of `model`, one per key."""
    found: dict[KeyPath, ConfigError] = {}
    for item in error.errors(include_url=False):
        spot = locate(model, item["loc"])
        if spot.path not in found:
            found[spot.path] = place.error(spot.path, _text(item["type"], item, spot, model, place))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Spot:
    """Where in the model an error lies: the path in the file, the field there and the model that owns it."""

    path: KeyPath
    annotation: object
    metadata: tuple[object, ...]
    description: str
    owner: type[BaseModel] | None


def locate(model: type[BaseModel], loc: Sequence[str | int]) -> Spot:
    """Follow pydantic's location through the models, dropping the tags it adds for members of a union."""
    annotation: object = model
    metadata: tuple[object, ...] = ()
    description, owner = "", None
    path: KeyPath = ()
    for part in loc:
        annotation, more = unwrap(annotation)
        metadata += more
        chosen = tagged_member(annotation, part)
        if chosen is not None:
            annotation = chosen
            continue
        kind = annotation if isinstance(annotation, type) else get_origin(annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            owner, path = kind, (*path, part)
            field = kind.model_fields.get(str(part))
            if field is None:
                return Spot(path, None, (), "", owner)
            annotation, metadata, description = field.annotation, tuple(field.metadata), field.description or ""
        elif kind in {dict, tuple} and (kind is dict or isinstance(part, int)):
            path, owner, metadata = (*path, part), None, ()
            annotation = _item(annotation, part)
        # Anything else is a tag of a plain union ('int', 'str') and no part of the file.
    annotation, more = unwrap(annotation)
    return Spot(path, annotation, metadata + more, description, owner)


def _item(annotation: object, part: str | int) -> object:
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return arguments[1]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return arguments[min(int(part), len(arguments) - 1)]


def unwrap(annotation: object) -> tuple[object, tuple[object, ...]]:
    """The annotation without `Annotated` and `| None`, and the metadata found on the way."""
    metadata: tuple[object, ...] = ()
    while True:
        if get_origin(annotation) is Annotated:
            inner, *extra = get_args(annotation)
            for item in extra:
                metadata += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
            annotation = inner
            continue
        members = _members(annotation)
        if len(members) == 2 and type(None) in members:
            annotation = next(m for m in members if m is not type(None))
            metadata += (None,)
            continue
        return annotation, metadata


def _members(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, types.UnionType} else ()


def tagged_member(annotation: object, tag: object) -> object | None:
    """The member of a union that has the tag: of models by their `name`, of others as they are annotated."""
    for member in _members(annotation):
        if any(isinstance(item, Tag) and item.tag == tag for item in unwrap(member)[1]):
            return unwrap(member)[0]
        if _is_model(member) and tag in _names_of(member):
            return member
    return None


def _names_of(member: type[BaseModel]) -> tuple[Any, ...]:
    field = member.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _text(kind: str, item: ErrorDetails, spot: Spot, model: type[BaseModel], place: Place) -> str:
    if kind == "words":
        return str(item["msg"])
    if kind == "extra_forbidden":
        return _unknown_key(spot, model, place)
    allowed = describe(spot.annotation, spot.metadata)
    meaning = f" ({spot.description})" if spot.description and spot.description not in allowed else ""
    if kind in {"missing", "union_tag_not_found"}:
        what = "is missing" if kind == "missing" else f"got {seen(item['input'])} without a name"
        return f"{what}; needed: {allowed}{meaning}"
    value = item["input"]
    if kind == "union_tag_invalid":
        value = value.get("name") if isinstance(value, dict) else value
        tags = [str(tag) for m in _members(spot.annotation) if _is_model(m) for tag in _names_of(m)]
        return f"got name {seen(value)}; allowed: {' or '.join(tags)}{did_you_mean(str(value), tags)}"
    return f"got {seen(value)}; allowed: {allowed}{meaning}{_hint(kind, value, spot.annotation)}"


def _hint(kind: str, value: object, annotation: object) -> str:
    if isinstance(value, str) and annotation in {int, float} and looks_like_number(value):
        return "; write it without quotes"
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return "; put it in quotes"
    if isinstance(value, str):
        return did_you_mean(value, _choices(annotation) or (("true", "false") if annotation is bool else ()))
    return ""


def _choices(annotation: object) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    return []


def describe(annotation: object, metadata: Iterable[object] = ()) -> str:
    """What a field allows, in words: 'a whole number from 1 to 64'."""
    annotation, more = unwrap(annotation)
    facts = (*metadata, *more)
    choices, members = _choices(annotation), _members(annotation)
    models = [member for member in members if _is_model(member)]
    if choices:
        words = " or ".join(choices)
    elif models:
        words = " or ".join(f"{{name: {_names_of(model)[0]}, ...}}" for model in models)
    elif members:
        words = "text, a finite number, true, false or null"
    elif _is_model(annotation):
        words = "a mapping with the keys " + ", ".join(annotation.model_fields)
    elif get_origin(annotation) is tuple:
        words = _describe_list(get_args(annotation))
    else:
        words = _TYPE_WORDS.get(get_origin(annotation) or annotation, "a value")
    words += _describe_range(facts)
    return f"{words}, or null" if None in facts else words


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _describe_list(arguments: tuple[Any, ...]) -> str:
    if arguments[-1] is Ellipsis:
        return f"a non-empty list, each item {describe(arguments[0])}"
    return f"[low, high], each {describe(arguments[0])}"


def _describe_range(facts: Iterable[object]) -> str:
    low = high = pattern = ""
    for fact in facts:
        match fact:
            case at.Ge(ge=bound):
                low = f"{bound}"
            case at.Gt(gt=bound):
                low = f"above {bound}"
            case at.Le(le=bound):
                high = f"{bound}"
            case at.MaxLen(max_length=length):
                pattern = f" (at most {length} long)"
        if getattr(fact, "pattern", None) == NAME_PATTERN:
            pattern = f": {NAME_WORDS}"
    if low and high:
        return f" from {low} to {high}" if not low.startswith("above") else f" {low} and up to {high}"
    return pattern


def _unknown_key(spot: Spot, model: type[BaseModel], place: Place) -> str:
    key, owner = str(spot.path[-1]), spot.owner
    allowed = list(owner.model_fields) if owner is not None else []
    # Letters of other alphabets look like those of a key that is known.
    shown = printable(key, 60) if key.isascii() else ascii(key[:60])[1:-1]
    return f"unknown key '{shown}'; allowed: {', '.join(allowed)}{_suggestion(key, allowed, spot, model, place)}"


def _suggestion(key: str, allowed: list[str], spot: Spot, model: type[BaseModel], place: Place) -> str:
    """The key that was probably meant: one of the same section, one of another tool's, or one of another section."""
    here = nearest(key, allowed)
    if here is not None:
        return _meant((*spot.path[:-1], here), here, spot, place)
    if key in ELSEWHERE:
        return f"; did you mean '{ELSEWHERE[key]}'?"
    elsewhere = {path[-1]: path for path in reversed(list(_all_keys(model)))}
    match = nearest(key, elsewhere) if len(key) > 2 else None
    return "" if match is None else _meant(elsewhere[match], dotted(elsewhere[match]), spot, place)


def _meant(path: KeyPath, shown: str, spot: Spot, place: Place) -> str:
    line = place.document.lines.get(path)
    if line is None or place.is_set(spot.path):
        return f"; did you mean '{shown}'?"
    return f"; did you mean '{shown}', which line {line} gives already?"


def _all_keys(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        path = tuple(str(p) for p in (*prefix, name))
        yield path
        annotation, _ = unwrap(field.annotation)
        for inner in (annotation, *_members(annotation)):
            if _is_model(inner):
                yield from _all_keys(inner, path)
