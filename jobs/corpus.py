"""The text of the `language` job: Python's own sources on this machine, or files of the user's, read once per process.

Nothing is downloaded. Files are sorted by relative path; about 5 % of them are held out, chosen by a hash of the path,
so that the choice stays when files are added. Of too few files for that, the end of each is held out. Knows nothing of
models. Called by `jobs.language`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.jobs.folder import existing_folder, files_below, read_files
from orchestrator.jobs.folder import is_held_out as is_one_of
from orchestrator.jobs.remember import remembered

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
        num_files: files found, both parts.
        sha256: of both parts, hex; differs where another Python release has other sources.
    """

    train: Tensor
    held_out: Tensor
    num_files: int
    sha256: str

    @property
    def num_train_bytes(self) -> int:
        """Training text in bytes."""
        return len(self.train)


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
    return is_one_of(relative_path, HELD_OUT_PER_256)


def num_train_bytes(relative_path: str, num_bytes: int, *, is_by_file: bool) -> int:
    """How much of a file is trained on, from its beginning; the rest is held out.

    Args:
        relative_path: of the file.
        num_bytes: its size.
        is_by_file: whole files are held out; otherwise the end of every file is.
    """
    if is_by_file:
        return 0 if is_held_out(relative_path) else num_bytes
    return num_bytes - -(-num_bytes * HELD_OUT_PER_256 // 256)


def files_of(data_dir: str | None) -> tuple[Path, list[str]]:
    """A folder and the relative paths of the files to read in it; None stands for the standard library.

    Raises:
        ValueError: there is no such file or folder, it may not be read, or there is no file in it.
    """
    if data_dir is None:
        root = standard_library()
        return root, source_files(root)
    if Path(data_dir).is_file():
        return Path(data_dir).parent, [Path(data_dir).name]
    root = existing_folder(data_dir)
    paths = files_below(root, [""])
    if not paths:
        raise ValueError(f"data_dir={data_dir!r} has no file in it (hidden ones do not count); needed: text files")
    return root, paths


@remembered(maxsize=2)
def load_corpus(data_dir: str | None, max_bytes: int | None, on_bad_file: str) -> Corpus:
    """Read a file, all files of a folder, or the standard library; training text stops at `max_bytes`.

    Cached per process.

    Raises:
        ValueError: there is nothing to read, or a file is not text and `on_bad_file` is 'stop'; the message names it.
    """
    root, paths = files_of(data_dir)
    train, held_out = _read(root, paths, max_bytes, on_bad_file)
    digest = hashlib.sha256(held_out)
    digest.update(train)
    logger.info(
        "corpus %s: %d files, %d training bytes, %d held-out bytes, sha256 %s",
        data_dir or root,
        len(paths),
        len(train),
        len(held_out),
        digest.hexdigest(),
    )
    return Corpus(train=as_tensor(train), held_out=as_tensor(held_out), num_files=len(paths), sha256=digest.hexdigest())


def _read(root: Path, paths: list[str], max_bytes: int | None, on_bad_file: str) -> tuple[bytearray, bytearray]:
    """Training and held-out text of the files; of the former not more than `max_bytes`."""
    train, held_out = bytearray(), bytearray()
    is_by_file = {is_held_out(path) for path in paths} == {True, False}

    def is_full() -> bool:
        return max_bytes is not None and len(train) >= max_bytes

    def read(path: Path) -> None:
        text = _text(path)
        num_train = num_train_bytes(path.relative_to(root).as_posix(), len(text), is_by_file=is_by_file)
        held_out.extend(text[num_train:])
        if not is_full():
            train.extend(text[:num_train])

    # A training file is not opened once there is enough: more text than memory may lie there.
    needed = (path for path in paths if not (is_by_file and is_full() and not is_held_out(path)))
    read_files(root, needed, read, on_bad_file)
    if max_bytes is not None:
        del train[max_bytes:]
    return train, held_out


def _text(path: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        ValueError: it holds a byte that no text has, or is a pipe or device.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    text = path.read_bytes()
    check_is_text(text)
    return text


def check_is_text(text: bytes, begin: int = 0) -> None:
    """Look for a byte that no text has in a part of a file that begins at byte `begin`.

    Raises:
        ValueError: there is one.
    """
    place = text.find(0)
    if place >= 0:
        raise ValueError(f"it is not text: byte {begin + place} is zero (text in UTF-16 must be converted to UTF-8)")


def as_tensor(text: bytearray) -> Tensor:
    """The bytes as a uint8 tensor, without a copy."""
    # frombuffer refuses an empty buffer, and folders may hold nothing but empty files.
    return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
