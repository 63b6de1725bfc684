"""The manifest of a checkpoint: which files belong to it, their sizes and SHA-256, and whether they are still so.

A flipped bit in a tensor file loads silently (measured: 296 of 300 for torch.save, 299 of 300 for torch's distributed
checkpoint), so nothing of a checkpoint is believed, and nothing is unpickled, before its manifest has been verified.
The sums guard against damage, not against somebody who may write the directory: keep it as private as the code.
Knows files and JSON only, no tensors; called by `checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
# Plain names, in folders too, none of them `..`: nothing a manifest lists lies outside its directory.
_FILE_NAME = re.compile(r"(?!(.*/)?\.{1,2}(/|$))[^/\x00-\x1f]+(/[^/\x00-\x1f]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        schema: version of this layout.
        step: optimizer steps done.
        world_size: ranks that wrote it; any number may read it.
        torch_version: of the process that wrote it.
        extra: what the loop wanted kept, as JSON gives it back (tuples have become lists).
        tensors: description of the tensors, made and read by `flat_state`.
        files: every file but the manifest.
    """

    schema: int
    step: int
    world_size: int
    torch_version: str
    extra: dict[str, Any]
    tensors: dict[str, Any]
    files: tuple[FileEntry, ...]


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: canonical JSON of the manifest and its SHA-256.

    Raises:
        CheckpointError: something in it is not JSON.
    """
    body = asdict(manifest)
    text = canonical(body)
    return (canonical({"manifest": body, "sha256": _sha256(text.encode())}) + "\n").encode()


def decode(data: bytes) -> Manifest:
    """The manifest of those bytes.

    Raises:
        CheckpointError: they are not what `encode` wrote, to the last bit.
    """
    try:
        outer = json.loads(data)
        body = outer["manifest"]
        files = tuple(FileEntry(**entry) for entry in body["files"])
        manifest = Manifest(**{**body, "files": files})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read ({error}); use an older commit") from error
    if manifest.schema != SCHEMA:
        raise CheckpointError(
            f"{MANIFEST_NAME} has schema {manifest.schema!r}; allowed: {SCHEMA}; use the version that wrote it"
        )
    # Compared as bytes: a flipped bit that parses to the same values is still damage.
    if encode(manifest) != data:
        raise CheckpointError(f"{MANIFEST_NAME} does not match its own SHA-256; use an older commit")
    return manifest


def canonical(value: object) -> str:
    """`value` as JSON: sorted keys, no blanks, ASCII, no NaN.

    Raises:
        CheckpointError: it is not JSON-able.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"a checkpoint cannot keep this as JSON: {error}; allowed: str, int, finite float, bool, None, lists and "
            "dicts of them; convert it first"
        ) from error


def read(path: Path) -> Manifest:
    """The manifest of the checkpoint in `path`; its files are not looked at.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return decode((path / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} has no readable {MANIFEST_NAME} ({error}); it was never committed") from error


def describe(path: Path, below: Path | None = None) -> FileEntry:
    """Size and SHA-256 of a file as it lies on disk; its name is that below a directory, by default its own."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(below or path.parent).as_posix()
        return FileEntry(name=name, size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def problems_of(path: Path, manifest: Manifest) -> list[str]:
    """What of the checkpoint in `path` is not as its manifest says; empty where all is well."""
    return [problem for entry in manifest.files if (problem := _problem_of(path, entry)) is not None]


def _problem_of(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with one file, or None."""
    if not _FILE_NAME.fullmatch(entry.name):
        return f"file name {entry.name!r} is not a plain name"
    file = path / entry.name
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return f"{entry.name} is not a regular file"
        found = describe(file)
    except OSError as error:
        return f"{entry.name} cannot be read ({error})"
    if found.size_bytes != entry.size_bytes:
        return f"{entry.name} has {found.size_bytes} bytes; its manifest says {entry.size_bytes}"
    if found.sha256 != entry.sha256:
        return f"{entry.name} has SHA-256 {found.sha256[:12]}...; its manifest says {entry.sha256[:12]}..."
    return None


def sync_directory(path: Path) -> None:
    """Make names in `path` durable: a file is only as safe as the entry that leads to it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until those files are on disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
