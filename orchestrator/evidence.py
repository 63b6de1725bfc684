"""What a run leaves as evidence when it ends: its tables, its journal and its checkpoints, by size and SHA-256.

Written by the driver with a run's last word, removed when the run is resumed; compared by `verify`. The sums tell
damage and loss, not the work of somebody who may write the directory: whoever can alter a table can alter them too.
Knows files only, not what is in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator.control.journal import FILE_NAME as JOURNAL_NAME
from orchestrator.control.journal import segments
from orchestrator.names import write_atomically

FILE = ("control", "evidence.json")
_SCHEMA = 1
_CHUNK_BYTES = 1 << 20
_GROWING = frozenset({JOURNAL_NAME})
"""Files that are only added to: of these what was there is compared."""


class Fault(StrEnum):
    """What became of a file since the run ended."""

    MISSING = "missing"
    SHORT = "short"
    ALTERED = "altered"
    ADDED = "added"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One file that is not as it was.

    Attributes:
        path: relative to the run directory.
        fault: what became of it.
        detail: with numbers; empty where there is nothing to say.
    """

    path: str
    fault: Fault
    detail: str = ""

    def __str__(self) -> str:
        """A sentence."""
        words = {
            Fault.MISSING: "is missing; it was there when the run ended",
            Fault.SHORT: "is shorter than when the run ended",
            Fault.ALTERED: "is not as it was when the run ended",
            Fault.ADDED: "was not there when the run ended",
        }
        return f"{self.path} {words[self.fault]}{f' ({self.detail})' if self.detail else ''}"


def record(run_dir: Path) -> None:
    """Write down what there is, once nothing of the run is written any more.

    Raises:
        OSError: it cannot be written; the run is none the worse for it.
    """
    files = {path: _sum_of(run_dir / path, None) for path in _paths(run_dir)}
    text = json.dumps({"schema": _SCHEMA, "files": files}, sort_keys=True, indent=1)
    run_dir.joinpath(*FILE).parent.mkdir(exist_ok=True)
    write_atomically(run_dir.joinpath(*FILE), text)


def forget(run_dir: Path) -> None:
    """The run goes on: what was written down holds no longer."""
    run_dir.joinpath(*FILE).unlink(missing_ok=True)


def is_recorded(run_dir: Path) -> bool:
    """Whether the run's last driver wrote down what there is."""
    return run_dir.joinpath(*FILE).exists()


def differences(run_dir: Path) -> Iterator[Difference]:
    """Files that are not as they were when the run ended.

    Raises:
        ValueError: what was written down cannot be read.
    """
    try:
        record_ = json.loads(run_dir.joinpath(*FILE).read_text(encoding="utf-8"))
        files = {str(path): (int(size), str(sha)) for path, (size, sha) in record_["files"].items()}
        schema = int(record_["schema"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{'/'.join(FILE)} cannot be read ({type(error).__name__})") from None
    if schema > _SCHEMA:
        raise ValueError(f"{'/'.join(FILE)} was written by a newer version (schema {schema}); allowed: {_SCHEMA}")
    for path in sorted(files.keys() | set(_paths(run_dir))):
        found = Difference(path=path, fault=Fault.ADDED) if path not in files else _compare(run_dir, path, *files[path])
        if found is not None:
            yield found


def _compare(run_dir: Path, path: str, size: int, sha: str) -> Difference | None:
    file = run_dir / path
    try:
        now = file.stat().st_size
        if now < size:
            return Difference(path=path, fault=Fault.SHORT, detail=f"{now} of {size} bytes")
        if now > size and path not in _GROWING:
            return Difference(path=path, fault=Fault.ALTERED, detail=f"{now} bytes instead of {size}")
        return None if _sum_of(file, size)[1] == sha else Difference(path=path, fault=Fault.ALTERED)
    except FileNotFoundError:
        return Difference(path=path, fault=Fault.MISSING)
    except OSError as error:
        return Difference(path=path, fault=Fault.ALTERED, detail=f"cannot be read: {error.strerror}")


def _paths(run_dir: Path) -> Iterator[str]:
    """Tables, journal, the run file as the run began, and the manifests of checkpoints."""
    yield from (path.name for path in segments(run_dir) if path.is_file())
    for pattern in ("control/run.yaml", "telemetry/*-*", "trials/*/checkpoints/*/manifest.json"):
        yield from (str(path.relative_to(run_dir)) for path in run_dir.glob(pattern) if path.is_file())
    for path in (run_dir / "trials").glob("*/pinned/**/manifest.json"):
        yield str(path.relative_to(run_dir))


def _sum_of(path: Path, size: int | None) -> tuple[int, str]:
    """Size and SHA-256 of a file, or of its first `size` bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while size is None or num_bytes < size:
            chunk = file.read(_CHUNK_BYTES if size is None else min(_CHUNK_BYTES, size - num_bytes))
            if not chunk:
                break
            digest.update(chunk)
            num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def record_or_not(run_dir: Path) -> None:
    """As `record`, where the disk takes it: without it `verify` can compare less, and says so."""
    with contextlib.suppress(OSError):
        record(run_dir)
