"""The text of the `language` job: Python source files found on this machine, read once per process.

Nothing is downloaded. Files are sorted by relative path; about 5 % of them are held out, chosen by a hash of the path,
so that the choice stays when files are added. Knows nothing of models. Called by `jobs.language`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HELD_OUT_PER_256 = 13
"""Files held out of 256, by the first byte of the SHA-256 of their relative path: 5.1 %."""

# Tests repeat themselves and are absent on some systems; third-party packages differ from machine to machine;
# pydoc_data is one huge file of prose, which would be most of either part.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text as bytes.

    Attributes:
        train: uint8 tensor, the training files one after another.
        held_out: uint8 tensor, the held-out files one after another; the same whatever `max_bytes` is.
        num_files: files read, both parts.
        sha256: of both parts, hex; differs where another Python release has other sources.
    """

    train: Tensor
    held_out: Tensor
    num_files: int
    sha256: str


def standard_library() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> list[str]:
    """Relative POSIX paths of the Python files below `root`, sorted, without tests and third-party packages."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        base = Path(folder)
        found += [(base / name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the held-out part."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < HELD_OUT_PER_256


@lru_cache(maxsize=2)
def load_corpus(root: Path, max_bytes: int | None) -> Corpus:
    """Read all files below `root`; training text stops at `max_bytes`. Cached per process.

    Raises:
        ValueError: there is no Python file below `root` for one of the two parts.
    """
    paths = source_files(root)
    held_out = [path for path in paths if is_held_out(path)]
    train = [path for path in paths if not is_held_out(path)]
    for part, chosen in (("training", train), ("held-out", held_out)):
        if not chosen:
            raise ValueError(
                f"no {part} file among the {len(paths)} *.py files below {root}; needed: at least one per part (about "
                f"1 file in 20 is held out); set data_dir to a folder with more Python files"
            )
    train_bytes = _read(root, train, max_bytes)
    held_out_bytes = _read(root, held_out, None)
    digest = hashlib.sha256(held_out_bytes)
    digest.update(train_bytes)
    logger.info(
        "corpus %s: %d files, %d training bytes, %d held-out bytes, sha256 %s",
        root,
        len(paths),
        len(train_bytes),
        len(held_out_bytes),
        digest.hexdigest(),
    )
    return Corpus(
        train=_as_tensor(train_bytes),
        held_out=_as_tensor(held_out_bytes),
        num_files=len(paths),
        sha256=digest.hexdigest(),
    )


def _read(root: Path, relative_paths: list[str], max_bytes: int | None) -> bytearray:
    text = bytearray()
    for relative_path in relative_paths:
        text += (root / relative_path).read_bytes()
        if max_bytes is not None and len(text) >= max_bytes:
            del text[max_bytes:]
            break
    return text


def _as_tensor(text: bytearray) -> Tensor:
    # frombuffer refuses an empty buffer, and folders may hold nothing but empty files.
    return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
