"""Every place of the code that writes to a disk, and what happens there when the disk is full.

The list is compared with the code: a write that is not in it fails `test_full_disk`. `full_at` makes one of them fail.
"""

from __future__ import annotations

import ast
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

WRITES = frozenset({"write_text", "write_bytes", "fsync", "copytree", "copyfile", "copy2", "copy", "touch"})
"""Names of calls that write, beside `open` for writing."""
_PATHS_ONLY = frozenset({"copy"})  # also of dictionaries and snapshots: only that of shutil counts


class When(StrEnum):
    """What happens on a full disk."""

    WAITS = "who has to write waits until there is room, and then goes on"
    KEEPS = "what is to be written is kept in memory and written later"
    SKIPS = "it is left out: a cache, a note or a view, which the run can do without"
    SAYS = "it ends with one clear message: a command of the user's, or before a run has begun"
    ENDS = "the attempt of the trial ends with the cause `disk`; `resume` tries it again"
    PART = "a part of another one in this list, which says what happens"


SITES: dict[str, When] = {}


def _add(when: When, *sites: str) -> None:
    SITES.update(dict.fromkeys(sites, when))


_add(
    When.WAITS,
    "orchestrator/control/actor.py:__init__",
    "orchestrator/control/journal.py:_write",
    "orchestrator/control/journal.py:sync",
    "orchestrator/control/resumption.py:keep_commit",
    "orchestrator/driver.py:single_driver",
    "orchestrator/train/checkpoint.py:_write_parts",
    "orchestrator/train/function/commits.py:write",
    "orchestrator/train/function/workplace.py:_opened",
)
_add(When.KEEPS, "orchestrator/telemetry/segment.py:_open", "orchestrator/telemetry/store.py:_compact_one")
_add(
    When.SKIPS,
    "orchestrator/control/snapshots.py:save",
    "orchestrator/control/status.py:write_file",
    "orchestrator/hung.py:answer_with_stacks",
    "orchestrator/output.py:_put",
    "orchestrator/output.py:_write_all",
    "orchestrator/output.py:give_up",
    "orchestrator/output.py:lasting_output",
    "orchestrator/room.py:has_room",
    "orchestrator/train/precision/calibrate.py:store",
    "orchestrator/train/step_mode/compiled.py:_is_my_turn",
)
_add(
    When.SAYS,
    "orchestrator/api.py:_job_of",
    "orchestrator/api.py:run_file_of",
    "orchestrator/beginning.py:_ship_functions",
    "orchestrator/cluster.py:_in_one_message",
    "orchestrator/commands/files.py:init",
    "orchestrator/commands/own_training.py:write_training",
    "orchestrator/control/cluster_actor.py:__init__",
    "orchestrator/control/repair.py:repair",
    "orchestrator/leftovers.py:make_home",
    "orchestrator/train/export.py:_write_function",
    "orchestrator/train/export.py:_write_model",
    "orchestrator/train/export.py:export",
    "orchestrator/tune/search.py:thaw",
)
_add(When.ENDS, "orchestrator/train/function/commits.py:take_out")
_add(
    When.PART,
    "orchestrator/control/journal.py:_open",
    "orchestrator/control/journal.py:_sync_directory",
    "orchestrator/names.py:write_atomically",
    "orchestrator/telemetry/store.py:_sync",
    "orchestrator/train/batch/memory.py:reset",
    "orchestrator/train/manifest.py:sync_directory",
    "orchestrator/train/manifest.py:sync_files",
    "orchestrator/train/manifest.py:write_synced",
)


def site_of(path: Path, function: str) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{function}"


def found() -> dict[str, int]:
    """Every function that writes, and the line of its first write."""
    sites: dict[str, int] = {}
    for path in sorted((ROOT / "orchestrator").rglob("*.py")):
        for function, line in _writes_of(path):
            sites.setdefault(site_of(path, function), line)
    return sites


def _writes_of(path: Path) -> Iterator[tuple[str, int]]:
    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and _is_write(node):
            yield function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(path.read_text()), "<module>")


def _is_write(call: ast.Call) -> bool:
    """Whether a call opens a file for writing, or writes."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in {"open", "OSFile"}:
        if owner == "os":
            return "O_WRONLY" in ast.unparse(call)
        modes = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        return any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)
    if name in {"write"} and owner == "os":
        return True
    if name in {"ParquetWriter", "save_model", "save_tensors", "FileHandler"}:
        return True
    return name in WRITES and (name not in _PATHS_ONLY or owner == "shutil")


@contextmanager
def full_at(*functions: str, times: int = 1 << 30) -> Iterator[list[str]]:
    """Make writes within functions of those names fail as on a full disk, so many times; what failed is in the list."""
    failed: list[str] = []
    open_ = Path.open

    def strikes() -> bool:
        frame = sys._getframe(2)
        for _ in range(12):
            if frame.f_code.co_name in functions and str(ROOT / "orchestrator") in frame.f_code.co_filename:
                if len(failed) < times:
                    failed.append(frame.f_code.co_name)
                    return True
                return False
            if frame.f_back is None:
                break
            frame = frame.f_back
        return False

    def failing(plain: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            mode = str(options.get("mode", "".join(map(str, arguments[1:2]))))
            needs_no_room = plain is open_ and not set(mode) & set("wax")  # reading, and writing over what is there
            if not needs_no_room and strikes():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (os, "write"),
            (os, "fsync"),
            (Path, "write_text"),
            (Path, "write_bytes"),
            (Path, "open"),
        ):
            patch.setattr(module, name, failing(getattr(module, name)))
        yield failed
