"""Reads a YAML run file into plain data and remembers the line of every key.

Deliberately narrower than YAML: one document of at most 1 MB, no tags, few aliases, no duplicate keys, bounded depth,
and YAML 1.2 scalars (`1e-3` is a number, `no` is a word). No object is ever constructed from the file's say-so, and
nothing here knows what a run is. Called by `config.resolve` for the file, by
`config.overrides` for the values of `--set`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from orchestrator.config.words import did_you_mean, printable, seen
from orchestrator.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 16
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels; a run file needs 5"
MAX_ALIASES = 64
_MERGE_KEY = "<<"
MAX_VALUES = 20_000

KeyPath = tuple[str | int, ...]

# libyaml where PyYAML was built with it: a full 1 MB file is then read in 0.1 s instead of several.
_Loader: type[yaml.SafeLoader] | type[yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?[0-9]{1,40}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,32}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,5})?")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True, slots=True)
class Document:
    """What a YAML text holds.

    Attributes:
        data: plain dicts, lists and scalars.
        lines: 1-based line of every key and list item, by its path.
        problems: duplicate keys and keys that are no text, to be reported with everything else.
    """

    data: object
    lines: dict[KeyPath, int]
    problems: tuple[ConfigError, ...] = ()

    def line_of(self, path: KeyPath) -> int | None:
        """Line of the path, or of its nearest ancestor that the text has; line 1 for the whole document."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 1 if self.lines else None


def plain_scalar(text: str) -> object:
    """The value of an unquoted YAML 1.2 scalar: null, boolean, integer, number or text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    return float(text) if _FLOAT.fullmatch(text) else text


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file of at most `MAX_FILE_BYTES`.

    Raises:
        ConfigError: it is missing, no regular file, unreadable, too large or no UTF-8 text.
    """
    try:
        # Without O_NONBLOCK the open itself would wait for ever on a named pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"no such file{_similar_file(path)}; `orchestrator init` writes one", _shown(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot be read ({reason}); allowed: a readable YAML file", _shown(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ConfigError(f"is {kind}; allowed: a regular YAML file", _shown(path))
    with os.fdopen(descriptor, "rb") as stream:
        raw = stream.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"is larger than {MAX_FILE_BYTES} bytes; allowed: a run file of at most 1 MB", _shown(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        text = f"byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; allowed: UTF-8 text"
        raise ConfigError(text, _shown(path), line) from None


def _shown(path: Path) -> str:
    return printable(str(path), 200)


def _similar_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in {".yaml", ".yml"})
    except OSError:
        return ""
    return did_you_mean(path.name, names[:1000])


def parse(text: str, place: str) -> Document:
    """Parse one YAML document; `place` is the file name for messages.

    Raises:
        ConfigError: it is no YAML, or uses what is not allowed here (tags, many aliases, depth, a second document).
    """
    builder = _Builder(place)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except UnicodeEncodeError:
        raise ConfigError("holds half of a surrogate pair; allowed: UTF-8 text", place) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"character U+{_code_point(error.character):04X} is not allowed in YAML; remove it"
        raise ConfigError(what, place, line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        if "nesting depth" in str(error):  # newer versions of libyaml have a limit of their own, far above ours
            raise ConfigError(_TOO_DEEP, place, line) from None
        raise ConfigError(f"is not valid YAML: {_yaml_problem(error)}", place, line) from None
    if not builder.has_root:
        raise ConfigError("is empty; allowed: a run file (`orchestrator init` writes one)", place)
    return Document(builder.root, builder.lines, tuple(builder.problems))


def _code_point(character: str | bytes | int) -> int:
    if isinstance(character, int):
        return character
    return ord(character[:1]) if character else 0


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    words = printable(" ".join(w for w in (error.context, error.problem) if w), 160)
    if "\\t" in words or "tab" in words or "start any token" in words:
        return f"{words}; indent with spaces, not tabs, and quote text that begins with a special character"
    return f"{words}; check indentation, colons and brackets here"


@dataclass(slots=True)
class _Frame:
    """One open list or mapping while it is being read."""

    value: dict[str, object] | list[object]
    path: KeyPath
    line: int
    anchor: str | None
    num_values: int = 1
    key: str | None = None
    has_key: bool = False


@dataclass(slots=True)
class _Builder:
    """Turns parser events into plain data, checking limits before anything grows."""

    place: str
    root: object = None
    has_root: bool = False
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)
    anchors: dict[str, tuple[object, int]] = field(default_factory=dict)
    num_aliases: int = 0
    num_documents: int = 0

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 1
        self._refuse_tag(event, line)
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style is None or event.style == ""
            value = plain_scalar(event.value) if plain else event.value
            self._add(value, 1, event.anchor, line, raw_key=event.value)
        elif isinstance(event, yaml.AliasEvent):
            value, num_values = self._aliased(event.anchor, line)
            self._add(value, num_values, None, line)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._open(event, line)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            frame = self.frames.pop()
            self._add(frame.value, frame.num_values, frame.anchor, frame.line)
        elif isinstance(event, yaml.DocumentStartEvent):
            self.num_documents += 1
            if self.num_documents > 1:
                raise ConfigError("a second document begins ('---'); allowed: one document per file", self.place, line)

    def _refuse_tag(self, event: yaml.Event, line: int) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            text = f"tag '{printable(str(tag), 60)}' is not allowed; write the plain value"
            raise ConfigError(text, self.place, line)

    def _aliased(self, anchor: str | None, line: int) -> tuple[object, int]:
        self.num_aliases += 1
        if self.num_aliases > MAX_ALIASES:
            raise ConfigError(f"has more than {MAX_ALIASES} aliases; write the values out", self.place, line)
        if anchor is None or anchor not in self.anchors:
            text = f"alias '*{printable(str(anchor), 60)}' has no finished anchor before it; write the value out"
            raise ConfigError(text, self.place, line)
        return self.anchors[anchor]

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        if len(self.frames) >= MAX_DEPTH:
            raise ConfigError(_TOO_DEEP, self.place, line)
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        path = self._path_of_next(line) if self.frames else ()
        value: dict[str, object] | list[object] = {} if is_mapping else []
        self.frames.append(_Frame(value=value, path=path, line=line, anchor=event.anchor))

    def _path_of_next(self, line: int) -> KeyPath:
        frame = self.frames[-1]
        if isinstance(frame.value, list):
            return (*frame.path, len(frame.value))
        if not frame.has_key:
            raise ConfigError("a list or mapping is used as a key; allowed: text", self.place, line)
        # A refused key leaves no lines behind: what hangs below it is kept apart under a name no file can hold.
        return (*frame.path, "\0" if frame.key is None else frame.key)

    def _add(self, value: object, num_values: int, anchor: str | None, line: int, raw_key: str | None = None) -> None:
        if anchor is not None:
            self.anchors[anchor] = (value, num_values)
        if not self.frames:
            self.root, self.has_root = value, not (value is None and raw_key == "" and anchor is None)
            return
        frame = self.frames[-1]
        frame.num_values += num_values
        if frame.num_values > MAX_VALUES:
            raise ConfigError(f"holds more than {MAX_VALUES} values (aliases counted out)", self.place, line)
        if isinstance(frame.value, list):
            self.lines[(*frame.path, len(frame.value))] = line
            frame.value.append(value)
        elif frame.has_key:
            if frame.key is not None:
                frame.value[frame.key] = value
            frame.has_key = False
        else:
            frame.key, frame.has_key = self._key(frame, value, raw_key, line), True

    def _key(self, frame: _Frame, value: object, raw_key: str | None, line: int) -> str | None:
        """The key, or None where it is refused and its value is to be dropped."""
        if raw_key is None:
            raise ConfigError("a list, mapping or alias is used as a key; allowed: text", self.place, line)
        if raw_key == _MERGE_KEY:
            text = "merge keys ('<<') are not read, YAML 1.2 has none; write the values out, or alias a whole section"
            raise ConfigError(f"{text}: key: *anchor", self.place, line, dotted(frame.path) or None)
        if not isinstance(value, str):
            text = f"key {seen(value)} is no text; put it in quotes"
            self.problems.append(ConfigError(text, self.place, line, dotted(frame.path) or None))
            return None
        path = (*frame.path, value)
        if value in frame.value:
            text = f"is given twice (first in line {self.lines[path]}); keep one"
            self.problems.append(ConfigError(text, self.place, line, dotted(path)))
            return None
        self.lines[path] = line
        return value


def dotted(path: KeyPath) -> str:
    """'search.space.lr[0]' for a path of keys and list positions."""
    parts: Iterator[str] = (f"[{p}]" if isinstance(p, int) else "." + printable(p, 80) for p in path)
    return "".join(parts).removeprefix(".")
