"""Pictures in files: which there are in a folder per class, and reading one.

Without torch, so that loader processes are small. Knows nothing of models. Called by the data of `image` and `tissue`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from orchestrator.jobs.extras import load_extra
from orchestrator.jobs.folder import BROKEN, STOP, broken_file, files_below, is_held_out, read_files

Bytes = npt.NDArray[np.uint8]
Value = TypeVar("Value")
Labelled = tuple[str, int]
"""Relative path and label."""

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
HELD_OUT_PER_256 = 38
"""Images held out of 256 where a folder has no validation part: 15 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFiles:
    """Pictures in a folder per class, none of them opened yet.

    Attributes:
        root: folder that the paths are relative to.
        classes: name of each label.
        train, held_out: the files of both parts with their labels, sorted by path.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Labelled, ...]
    held_out: tuple[Labelled, ...]


def class_files(root: Path, max_samples: int | None) -> ClassFiles:
    """The pictures below `train` and `val` (or `test`) where those are there, else split by path.

    Of more than `max_samples` training pictures so many are taken, evenly out of all, so that no class goes missing.

    Raises:
        ValueError: there are not two classes, or Pillow is missing.
    """
    train_root = root / "train"
    held_out_root = next((root / name for name in ("val", "valid", "test") if (root / name).is_dir()), None)
    if train_root.is_dir() and held_out_root is not None:
        train = [(train_root / path, path) for path in files_below(train_root, IMAGE_ENDINGS)]
        held_out = [(held_out_root / path, path) for path in files_below(held_out_root, IMAGE_ENDINGS)]
    else:
        base = train_root if train_root.is_dir() else root
        paths = files_below(base, IMAGE_ENDINGS)
        train = [(base / path, path) for path in paths if not is_held_out(path, HELD_OUT_PER_256)]
        held_out = [(base / path, path) for path in paths if is_held_out(path, HELD_OUT_PER_256)]
    classes = tuple(sorted({_class_of(path) for _, path in (*train, *held_out)} - {""}))
    if len(classes) < 2:
        raise ValueError(
            f"data_dir={str(root)!r} has {len(classes)} folders with images ({', '.join(IMAGE_ENDINGS)}) and no CIFAR "
            f"files; needed: at least two folders, one per class, each named after its class"
        )
    load_extra("PIL.Image", "reading pictures")  # before the first file, so that it is not taken for a broken one
    number = {name: label for label, name in enumerate(classes)}
    parts = [
        # Loose files have no class.
        tuple((file.relative_to(root).as_posix(), number[_class_of(path)]) for file, path in part if _class_of(path))
        for part in (train, held_out)
    ]
    return ClassFiles(root=root, classes=classes, train=evenly(parts[0], max_samples), held_out=parts[1])


def evenly(files: Sequence[Labelled], count: int | None) -> tuple[Labelled, ...]:
    """At most `count` of them, spread evenly from the first to the last."""
    if count is None or count >= len(files):
        return tuple(files)
    return tuple(files[int(place)] for place in np.linspace(0, len(files) - 1, count))


def usable(
    files: ClassFiles, part: str, read: Callable[[Path], Value], on_bad_file: str
) -> list[tuple[Labelled, Value]]:
    """The files of a part ('training' or 'held-out') that `read` can read, and what it makes of them.

    Raises:
        ValueError: there is none, or a broken one and `on_bad_file` is 'stop'.
    """
    labels = dict(files.train if part == "training" else files.held_out)
    found = read_files(files.root, labels, read, on_bad_file)
    if not found:
        raise ValueError(f"data_dir={str(files.root)!r} has no usable {part} image; needed: at least one")
    return [((path, labels[path]), value) for path, value in found]


def _class_of(relative_path: str) -> str:
    """The first folder of a path, '' where it has none."""
    first, slash, _ = relative_path.partition("/")
    return first if slash else ""


def read_image(path: Path, size: int) -> Bytes:
    """One picture as (3, size, size): scaled so that its shorter side fits, and its middle cut out.

    Raises:
        ValueError: no picture, a broken one, or one so large that it must be a mistake; or Pillow is missing.
    """
    pillow = load_extra("PIL.Image", "reading pictures")
    operations = load_extra("PIL.ImageOps", "reading pictures")
    with _opened(path) as picture:
        fitted = operations.fit(picture.convert("RGB"), (size, size), method=pillow.Resampling.BILINEAR)
        return np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1)


def check_header(path: Path) -> None:
    """Look at the beginning of a picture's file, without decoding it.

    Raises:
        ValueError: it is no picture, or one so large that it must be a mistake; or Pillow is missing.
    """
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A picture whose header was read; one that is too large is a ValueError, here and while it is decoded."""
    pillow = load_extra("PIL.Image", "reading pictures")
    try:
        with pillow.open(path) as picture:
            yield picture
    except pillow.DecompressionBombError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureDataset:
    """Pictures by number, decoded when they are asked for; what `jobs.loading.MapLoader` reads from.

    Attributes:
        root: folder that the paths are relative to.
        paths: the file of each number.
        size: side in pixels.
        on_bad_file: 'stop' or 'skip'.
    """

    root: Path
    paths: tuple[str, ...]
    size: int
    on_bad_file: str

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Bytes | None:
        """The picture (3, size, size); None where it is broken and such files are skipped.

        Raises:
            ValueError: it is broken and `on_bad_file` is 'stop'; the message names it.
        """
        path = self.root / self.paths[index]
        try:
            return read_image(path, self.size)
        except BROKEN as error:
            if self.on_bad_file == STOP:
                raise broken_file(path, error) from error
            return None
