"""Training text that stays on disk: a file or folder, or the standard library, read forward while a model trains on it.

The text is the same, byte for byte, as `jobs.corpus` would hold in memory, but each file is looked through once, when
a trial first begins, and then read again as its windows are asked for. Knows nothing of models. Called by
`jobs.language`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from orchestrator.jobs.corpus import as_tensor, check_is_text, files_of, is_held_out, num_train_bytes
from orchestrator.jobs.folder import read_files
from orchestrator.jobs.remember import remembered

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_HELD_OUT_BYTES = 64 << 20
"""Held-out text that is kept in memory, at most; evaluations look at a small part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStream:
    """Which bytes of which files are trained on, and the text that is held out.

    Attributes:
        root: folder that the paths are relative to.
        pieces: relative path and number of training bytes of each file, in the order of the text.
        held_out: uint8 tensor, the held-out text.
    """

    root: Path
    pieces: tuple[tuple[str, int], ...]
    held_out: Tensor

    @property
    def num_train_bytes(self) -> int:
        """Training text in bytes."""
        return sum(count for _, count in self.pieces)

    def windows_from(self, first: int, size: int) -> Iterator[bytes]:
        """Windows `first`, `first + 1`, ... of `size` bytes, which do not overlap; what is left at the end is unused.

        Raises:
            ValueError: a file cannot be read any more, or has become shorter; the message names it.
        """
        kept = bytearray()
        for chunk in self._chunks(first * size):
            kept += chunk
            num_whole = len(kept) // size * size
            for start in range(0, num_whole, size):
                yield bytes(kept[start : start + size])
            del kept[:num_whole]

    def _chunks(self, position: int) -> Iterator[bytes]:
        """The training text from that byte on."""
        for relative_path, count in self.pieces:
            if position >= count:
                position -= count
                continue
            path = self.root / relative_path
            try:
                with path.open("rb") as stream:
                    stream.seek(position)
                    while position < count:
                        chunk = stream.read(min(CHUNK_BYTES, count - position))
                        if not chunk:
                            raise ValueError(f"{path} has become shorter since this trial began; start it anew")
                        position += len(chunk)
                        yield chunk
            except OSError as error:
                raise ValueError(f"{path} could be read when this trial began and cannot now: {error}") from error
            position = 0


@remembered(maxsize=2)
def open_text(data_dir: str | None, max_bytes: int | None, on_bad_file: str) -> TextStream:
    """Look through a file, all files of a folder, or the standard library; training text stops at `max_bytes`.

    Cached per process.

    Raises:
        ValueError: there is nothing to read, or a file is not text and `on_bad_file` is 'stop'; the message names it.
    """
    root, paths = files_of(data_dir)
    is_by_file = {is_held_out(path) for path in paths} == {True, False}
    pieces: list[tuple[str, int]] = []
    held_out = bytearray()
    left = max_bytes

    def look_through(path: Path) -> None:
        nonlocal left
        relative_path = path.relative_to(root).as_posix()
        num_bytes = _checked_size(path)
        num_train = num_train_bytes(relative_path, num_bytes, is_by_file=is_by_file)
        with path.open("rb") as stream:
            stream.seek(num_train)
            held_out.extend(stream.read(min(num_bytes - num_train, MAX_HELD_OUT_BYTES - len(held_out))))
        if left is not None:
            num_train = min(num_train, left)
            left -= num_train
        if num_train:
            pieces.append((relative_path, num_train))

    # A training file is not opened once there is enough, as in `jobs.corpus`.
    needed = (path for path in paths if not (is_by_file and left == 0 and not is_held_out(path)))
    read_files(root, needed, look_through, on_bad_file)
    stream = TextStream(root=root, pieces=tuple(pieces), held_out=as_tensor(held_out))
    logger.info(
        "text of %s stays on disk: %d files, %d training bytes, %d held-out bytes in memory",
        data_dir or root,
        len(paths),
        stream.num_train_bytes,
        len(held_out),
    )
    return stream


def _checked_size(path: Path) -> int:
    """Bytes of a text file, all of which were looked at.

    Raises:
        ValueError: it holds a byte that no text has, or is a pipe or device.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    num_bytes = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            check_is_text(chunk, num_bytes)
            num_bytes += len(chunk)
    return num_bytes
